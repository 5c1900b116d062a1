"""Faults inside a rank of a real run, at a chosen moment; the trainer has no hooks for them.

A moment is found in what a rank reports anyway: the phase and step of its heartbeat, each time it is about to wait for
the other ranks. Inside a save only the interpreter's audit events show where it is.
"""

from __future__ import annotations

import ctypes
import gc
import os
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

_LAZY = 2
"""MNT_DETACH of umount2(2)."""


@dataclass(frozen=True)
class Moment:
    """A point of a run that every rank passes."""

    phase: str
    """Phase of the heartbeat: `start`, `forward`, `save`, `validate`, `test`."""
    step: int
    """Step of the heartbeat, 0 before the first one."""
    wait: int = 1
    """Before which wait for other ranks in that phase and step, from 1; 0: on entering the phase."""
    file: str = ""
    """Instead: when this rank opens a file whose path ends like this."""


@dataclass(frozen=True)
class Injection:
    """What one rank does at a moment.

    Args:
        does: as `act` takes it.
        mark: file that is written just before.
        every: repeat it each later time in the same phase.
    """

    rank: int
    moment: Moment
    does: str
    mark: Path
    every: bool = False


def plant(injection: Injection, rank: int) -> None:
    """Prepare this process, which is about to become a rank, to meet the fault if it is for this rank."""
    if rank != injection.rank:
        return
    moment = injection.moment
    passed: Counter[tuple[str, int]] = Counter()

    def strike() -> None:
        if injection.every or not injection.mark.exists():
            injection.mark.touch()
            act(injection.does)

    if moment.file:
        sys.addaudithook(_on_opening(moment.file, strike))
        return
    from trainer.distributed import Heartbeat

    enter, collective = Heartbeat.at, Heartbeat.collective

    def meet(heartbeat: Heartbeat, wait: int) -> None:
        here, there = (heartbeat.step, wait), (moment.step, moment.wait)
        if heartbeat.phase == moment.phase and (here == there or (injection.every and here > there)):
            strike()

    def watched_enter(heartbeat: Heartbeat, phase: str, step: int | None = None) -> None:
        enter(heartbeat, phase, step)
        meet(heartbeat, 0)

    def watched_collective(heartbeat: Heartbeat) -> AbstractContextManager[None]:
        if not heartbeat.waiting:
            passed[heartbeat.phase, heartbeat.step] += 1
            meet(heartbeat, passed[heartbeat.phase, heartbeat.step])
        return collective(heartbeat)

    patch.object(Heartbeat, "at", watched_enter).start()
    patch.object(Heartbeat, "collective", watched_collective).start()


def _on_opening(end: str, strike: Callable[[], None]) -> Callable[[str, tuple[Any, ...]], None]:
    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and str(arguments[0]).endswith(end):
            strike()

    return hook


def act(what: str) -> None:
    """Meet a fault: `SIGNAL` (its name), `segv`, `exit`, `raise TEXT`, `sleep SECONDS`, `hold SECONDS` (the interpreter
    lock), `nan` (in all trained tensors), `wait FILE`, `fill FILE` (until the disk is full), `unmount FOLDER`,
    `hang FILE` (who opens it waits forever, as on a file system that hangs), `remove FILE-OR-FOLDER` or `replace FOLDER
    OTHER`."""
    name, _, argument = what.partition(" ")
    if name.startswith("SIG"):
        os.kill(os.getpid(), signal.Signals[name])
        return
    _ACTS[name](argument)


def _raise(text: str) -> None:
    raise RuntimeError(text)


def _hold(seconds: str) -> None:
    ctypes.PyDLL(None).usleep(int(1e6 * float(seconds)))  # unlike `CDLL`, keeps the lock while it calls


def _poison(_: str) -> None:
    """NaN in the first element of what this rank trains, DeepSpeed's fp32 copies included, as from broken memory."""
    for tensor in _trained_tensors():
        tensor.data.view(-1)[:1] = float("nan")  # `data`: autograd does not see it


def _trained_tensors() -> Iterator[Any]:
    import torch

    for found in gc.get_objects():
        # By type: some libraries' proxies answer `isinstance` with an import.
        if type(found) in (torch.Tensor, torch.nn.Parameter) and found.requires_grad and found.is_leaf:
            yield found


def _wait(file: str) -> None:
    while not Path(file).exists():
        time.sleep(0.05)


def _fill(file: str) -> None:
    with suppress(OSError), Path(file).open("wb", buffering=0) as filler:  # until the disk is full
        while True:
            filler.write(bytes(4096))


def _unmount(folder: str) -> None:
    if ctypes.CDLL(None, use_errno=True).umount2(folder.encode(), _LAZY):
        raise OSError(ctypes.get_errno(), f"cannot unmount {folder}")


def _hang(file: str) -> None:
    Path(file).unlink(missing_ok=True)
    os.mkfifo(file)  # with no reader


def _remove(path: str) -> None:
    if Path(path).is_dir():
        shutil.rmtree(path)
    else:
        Path(path).unlink()


def _replace(words: str) -> None:
    folder, other = words.split()
    shutil.rmtree(folder)
    shutil.copytree(other, folder)


_ACTS: dict[str, Callable[[str], object]] = {
    "segv": lambda _: ctypes.string_at(0),
    "exit": lambda _: os._exit(0),
    "raise": _raise,
    "sleep": lambda seconds: time.sleep(float(seconds)),
    "hold": _hold,
    "nan": _poison,
    "wait": _wait,
    "fill": _fill,
    "unmount": _unmount,
    "hang": _hang,
    "remove": _remove,
    "replace": _replace,
}
