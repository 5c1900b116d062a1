"""Stop signals: noted on arrival, acted on by all ranks together at a step boundary.

Slurm sends SIGUSR1 ahead of the time limit and SIGTERM on preemption; they reach the ranks at different times, or only
one of them. A rank that stopped on its own would leave the others hanging in a collective, so a rank only notes the
signal and shares it: in training through the all-gather of every step (`trainer/engine/rank_status.py`), at no extra
collective or host sync; in an evaluation between two batches (`stop_together`). Torch-free, so that signals are noted
before torch is imported.

A stopped run leaves the empty file `RUN/requeue` and exits 0: batch scripts requeue the job if that file exists.
Ctrl-C (SIGINT) saves and stops in the same way, without that file, and the run exits with 130.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.distributed import World

STOPS = (signal.SIGUSR1, signal.SIGTERM)
_ONE_PRESS = 1.0
"""Seconds within which a second SIGINT is the same Ctrl-C: a terminal signals ranks and launchers, which pass it on."""


class Stopped(Exception):  # noqa: N818 - not an error
    """All ranks stop because one of them received a stop signal; the message names signal and rank."""


class StopSignals:
    """The latest stop signal that this process received."""

    def __init__(self) -> None:
        self.number = 0
        """Signal number; 0 for none."""
        self._interrupted = 0.0

    def install(self) -> None:
        """Note stop signals until the process ends; a second signal has no further effect."""
        for number in STOPS:
            signal.signal(number, self._note)

    def ignore(self) -> None:
        """Ignore stop signals once the work is done: at exit the interpreter restores the default, which kills."""
        for number in STOPS:
            signal.signal(number, signal.SIG_IGN)

    @contextmanager
    def noting_interrupts(self) -> Iterator[None]:
        """Within it, Ctrl-C asks to save and stop, as SIGTERM does; a second one interrupts at once."""
        if threading.current_thread() is not threading.main_thread():  # only it gets signals
            yield
            return
        before = signal.signal(signal.SIGINT, self._note_interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _note_interrupt(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.number == signal.SIGINT and now - self._interrupted > _ONE_PRESS:
            raise KeyboardInterrupt
        if self.number == 0 and os.environ.get("RANK", "0") == "0":
            # By descriptor: the signal may have come within a write to sys.stderr.
            os.write(2, b"\nsaving after this step, then stopping; press Ctrl-C again to stop at once\n")
        self.number, self._interrupted = number, now

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number


def stop_together(world: World, signals: StopSignals) -> None:
    """Leave an evaluation between two batches; every rank calls it.

    Raises:
        Stopped: on every rank alike.
    """
    if reason := stop_reason([int(number) for number in world.all_gather_value(signals.number)]):
        raise Stopped(reason)


def stop_reason(number_R: Sequence[int]) -> str | None:
    """Name the first of R ranks with a stop signal, as in "SIGUSR1 on rank 1"; None if no rank has one."""
    for rank, number in enumerate(number_R):
        if number:
            return f"{signal.Signals(number).name} on rank {rank}"
    return None
