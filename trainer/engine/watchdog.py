"""Ends a run that is stuck, and names the rank at fault.

Two daemon threads and a tiny process per rank, so that neither a blocked main thread, nor a stopped rank 0, nor a held
interpreter lock can silence them:

    messenger   publishes this rank's heartbeat every half second or so through the TCP store of the process group, and
                reads the other ranks' heartbeats once this rank is late. It may block: rank 0 hosts the store.
    judge       never waits for other ranks. Once this rank has been at one place for too long, it names the rank at
                fault, writes the stacks of all threads and ends the process.
    guard       a process (`trainer/engine/guard.py`) that ends this one if the judge itself cannot run.

A rank that dies by a signal such as SIGSEGV writes its stacks to the same file (`faulthandler`).
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import IO, NamedTuple, NoReturn, Self

import torch
from torch import distributed

from trainer.distributed import World
from trainer.engine.guard import Guard
from trainer.runs.folder import RunFolder

log = logging.getLogger(__name__)

EXIT_CODE = 3
_SLOW_PLACES = {"start", "epoch", "validate", "test"}
_SLOW_FACTOR = 10
"""Factor on the timeout at these places and in the first step."""
_GRACE = 5.0
"""Seconds that a rank gets to end on its own once the reason is known."""
_SILENT = "is not responding"
_STDERR = 2
"""A descriptor, because notebooks and tests put an object without one in the place of `sys.stderr`."""


class Beat(NamedTuple):
    """A rank's heartbeat, as published to the other ranks."""

    number: int
    """Count of beats; a rank whose count no longer changes is not responding."""
    step: int
    phase: str
    waiting: bool
    idle: float
    """Seconds at `phase`."""

    def __str__(self) -> str:
        return f"step {self.step} ({self.phase})"


class Verdict(NamedTuple):
    """Why the run ends."""

    ranks: list[int]
    """Ranks at fault; empty if unknown."""
    reason: str


class Watchdog:
    """Watches this rank while the context is active; an exception that leaves it is reported to the other ranks.

    Args:
        timeout: seconds at one place after which the run ends; ten times as long at slow places and in the first step.
    """

    def __init__(self, world: World, run: RunFolder, timeout: float) -> None:
        self._world, self._timeout = world, timeout
        self._stacks, self._collectives = run.stacks(world.rank), run.collectives(world.rank)
        self._crashes: IO[str] | None = None  # kept open for `faulthandler`
        self._heartbeat = world.heartbeat
        self._tick = min(0.5, timeout / 20)
        self._done = threading.Event()
        self._leaving = threading.Event()  # the main thread is ending with an exception of its own
        self._read_beats = threading.Event()  # asks the messenger to read the other ranks' beats too
        self._seen: dict[int, tuple[Beat, float]] = {}  # the last beat of each rank, and when its count last changed
        self._seen_at = 0.0  # when the beats were last read
        self._first_step = 0
        self._judging = threading.Thread(target=self._judge, name="watchdog_judge", daemon=True)
        self._ending = threading.Lock()
        self._verdict: Verdict | None = None
        self._published: Verdict | None = None  # the one verdict in the store, of any rank

    def __enter__(self) -> Self:
        self._crashes = _opened(self._stacks)
        faulthandler.enable(self._crashes or _STDERR)
        threading.Thread(target=self._messenger, name="watchdog_messenger", daemon=True).start()
        self._judging.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or self._world.size == 1:
            self._done.set()
            self._judging.join()  # the guard has ended
            self._forget_stacks()
            return
        if _is_failed_collective(error):  # another rank is at fault
            self._end(self._find_cause(error))
        self._leaving.set()
        here = f"step {self._heartbeat.step} ({self._heartbeat.phase})"
        reason = f"rank {self._world.rank} failed in {here}: {type(error).__name__}: {' '.join(str(error).split())}"
        self._verdict = Verdict([self._world.rank], reason)
        self._wait_for_delivery()
        self._forget_stacks()

    def _messenger(self) -> None:
        try:
            self._exchange_beats()
        except (distributed.DistError, RuntimeError):
            return  # the store ended with rank 0, or at the end of the run; the judge notices that no beats arrive

    def _exchange_beats(self) -> None:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        patience = timedelta(seconds=max(5.0, self._timeout))
        store = distributed.TCPStore(address, port, is_master=False, timeout=patience)  # type: ignore[attr-defined]
        everyone = [f"watchdog/beat/{rank}" for rank in range(self._world.size)]
        number = 0
        while not self._done.is_set():
            number += 1
            now = self._heartbeat
            beat = Beat(number, now.step, now.phase, now.waiting, time.monotonic() - now.since)
            store.set(everyone[self._world.rank], json.dumps(beat))
            if self._verdict and not self._published:
                store.compare_set("watchdog/end", "", json.dumps(self._verdict))  # the first verdict wins
            if store.check(["watchdog/end"]):
                self._published = Verdict(*json.loads(store.get("watchdog/end")))
            if self._read_beats.is_set():
                for rank, text in enumerate(store.multi_get(everyone)):
                    self._note(rank, Beat(*json.loads(text)))
                self._seen_at = time.monotonic()
            self._done.wait(self._tick)

    def _note(self, rank: int, beat: Beat) -> None:
        known = self._seen.get(rank)
        changed = time.monotonic() if known is None or known[0].number != beat.number else known[1]
        self._seen[rank] = (beat, changed)

    def _judge(self) -> None:
        with Guard(self._world.rank, self._stacks, alone=self._world.size == 1) as guard:
            self._watch(guard)

    def _watch(self, guard: Guard) -> None:
        published_at, before = None, time.monotonic()
        while not self._done.wait(self._tick / 2):
            now = time.monotonic()
            if now - before > 5 * self._tick:
                self._heartbeat.since += now - before  # this process was paused, as by `scontrol suspend`
            before = now
            idle, allowed = now - self._heartbeat.since, self._allowed()
            guard.alive(allowed + _GRACE)  # later than the other ranks, which tell where this one was last seen
            if idle > allowed / 2:
                self._read_beats.set()
            if self._published and published_at is None:
                published_at = now
            # A rank that ends with an exception of its own gets longer, to report that.
            if self._published and published_at and now - published_at > (2 if self._leaving.is_set() else 1) * _GRACE:
                self._end(self._published)
            if idle > allowed and not self._leaving.is_set():
                self._end(self._rank_at_fault(idle))

    def _allowed(self) -> float:
        step = self._heartbeat.step
        self._first_step = self._first_step or step
        slow = self._heartbeat.phase in _SLOW_PLACES or step == self._first_step
        return self._timeout * (_SLOW_FACTOR if slow else 1)

    def _rank_at_fault(self, idle: float) -> Verdict:
        """Which rank the others wait for, as far as this rank knows: a silent one, or else the furthest behind."""
        here = f"step {self._heartbeat.step} ({self._heartbeat.phase})"
        if self._world.size == 1:
            return Verdict([0], f"no progress for {idle:.0f} s in {here}")
        now = time.monotonic()
        waits = f"rank {self._world.rank} waits for it in {here}"
        if now - self._seen_at > 5 * self._tick:
            return Verdict([0], f"rank 0, which hosts the store, {_SILENT}; {waits}")
        beats = {rank: beat for rank, (beat, _) in self._seen.items()}
        silent = [rank for rank, (_, changed) in self._seen.items() if now - changed > 5 * self._tick]
        if silent:
            lost = "; ".join(f"rank {rank} {_SILENT}, last seen in {beats[rank]}" for rank in silent)
            return Verdict(silent, f"{lost}; {waits}")
        busy = [rank for rank, beat in beats.items() if not beat.waiting] or list(beats)
        first = min(beats[rank].step for rank in busy)
        late = [rank for rank in busy if beats[rank].step == first]
        stuck = "; ".join(f"rank {rank} has been stuck in {beats[rank]} for {beats[rank].idle:.0f} s" for rank in late)
        return Verdict(late, f"{stuck}; {waits}" if self._world.rank not in late else stuck)

    def _find_cause(self, error: BaseException) -> Verdict:
        """Why a collective failed: the verdict that an ending rank published, or which rank is not responding."""
        self._read_beats.set()
        # Six ticks, so that a missing beat shows (5 ticks), then the grace period for a verdict.
        end = time.monotonic() + _GRACE + 6 * self._tick
        while time.monotonic() < end and not self._published:
            time.sleep(self._tick / 2)
            lost = self._rank_at_fault(0.0)
            if time.monotonic() > end - _GRACE and _SILENT in lost.reason:
                return lost
        return self._published or Verdict([], f"rank {self._world.rank} lost contact with the other ranks: {error}")

    def _end(self, verdict: Verdict) -> NoReturn:
        self._ending.acquire()  # never released: a second thread that gets here waits for the process to end
        self._verdict = self._published or verdict
        # None of these may return: files may be on a file system that hangs, and a device may be stuck.
        for work in (self._write_stacks, partial(_dump_collectives, self._collectives), self._report):
            thread = threading.Thread(target=work, name="last words", daemon=True)
            thread.start()
            thread.join(_GRACE)
        self._wait_for_delivery()
        os._exit(EXIT_CODE)  # the main thread may be blocked in a collective, where no exception reaches it

    def _write_stacks(self) -> None:
        assert self._verdict is not None
        if file := _opened(self._stacks):
            print(f"rank {self._world.rank}, {self._verdict.reason}\n", file=file, flush=True)
            faulthandler.dump_traceback(file=file, all_threads=True)

    def _report(self) -> None:
        """Print why the run ends, on one rank."""
        assert self._verdict is not None
        # Only one rank reports it: the lowest that is not at fault, which is able to; rank 0 where all are.
        able = (rank for rank in range(self._world.size) if rank not in self._verdict.ranks)
        if self._world.rank == next(able, 0):
            line = f"{self._verdict.reason}; stacks are in {self._stacks.parent}/stacks-rank-*.txt"
            if self._world.is_main:
                log.error("error: %s", line)
            else:
                print(f"error: {line}", file=sys.stderr, flush=True)

    def _forget_stacks(self) -> None:
        """Close the file for crashes, and remove it if there was none."""
        faulthandler.enable(_STDERR)
        if self._crashes:
            self._crashes.close()
            with suppress(OSError):
                if not self._stacks.stat().st_size:
                    self._stacks.unlink()
                    self._stacks.parent.rmdir()  # only if it is empty: a refused run leaves nothing behind

    def _wait_for_delivery(self) -> None:
        """Give the messenger time to publish the verdict, and on rank 0 the others time to read it from its store."""
        time.sleep(self._tick * (4 if self._world.is_main else 2))


def _dump_collectives(path: Path) -> None:
    """Write the last collectives of this rank as NCCL's flight recorder has them, for `torchfrtrace`.

    NCCL would write them after its own time-out, but that one is longer than the watchdog's, because ranks may wait for
    each other for long at slow places.
    """
    dump = getattr(torch._C._distributed_c10d, "_dump_nccl_trace", None)  # in builds for CUDA only
    if dump is not None and distributed.get_backend() == "nccl":
        path.write_bytes(dump())


def _opened(stacks: Path) -> IO[str] | None:
    """The file opened behind what earlier starts left in it; None if it cannot be: a full disk must not end the run."""
    with suppress(OSError):
        stacks.parent.mkdir(parents=True, exist_ok=True)  # it may have been removed since the run began
        return stacks.open("a")
    return None


def _is_failed_collective(error: BaseException) -> bool:
    """Whether the error is a collective that failed because another rank is gone."""
    if isinstance(error, distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "NCCL", "HCCL"))
