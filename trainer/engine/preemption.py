"""Signals that ask a run to leave: noted when they come, acted on by all ranks together at a step boundary.

Slurm sends SIGUSR1 ahead of the time limit and SIGTERM when it preempts; they reach the ranks at different moments, or
only one of them. Ranks that acted on their own would leave the others in a collective, so a rank only notes the signal
and tells the others: in training with the all-gather of every step (`trainer/engine/rank_status.py`), so that no
collective and no host sync is added for it; in an evaluation between two batches (`stop_together`). Torch-free, so that
signals are noted before torch is imported.

A run that has stopped leaves the empty file `RUN/requeue` and exits 0: batch scripts requeue where that file is.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.distributed import World

STOPS = (signal.SIGUSR1, signal.SIGTERM)


class Stopped(Exception):  # noqa: N818 - nothing went wrong
    """All ranks leave what they do, because one was asked to; says by which signal."""


class StopSignals:
    """The latest stop signal that this process got."""

    def __init__(self) -> None:
        self.number = 0
        """Signal number; 0 for none."""

    def install(self) -> None:
        """Note stop signals from here to the end of the process, so that a second one changes nothing."""
        for number in STOPS:
            signal.signal(number, self._note)

    def ignore(self) -> None:
        """The work is done. Without this the interpreter's end would put back the default, which kills."""
        for number in STOPS:
            signal.signal(number, signal.SIG_IGN)

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
    """Which signal came to which of the R ranks, in words; None where none did."""
    for rank, number in enumerate(number_R):
        if number:
            return f"{signal.Signals(number).name} on rank {rank}"
    return None
