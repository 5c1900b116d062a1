"""Ends a run that is stuck, and says on which rank.

Two daemon threads a rank, so that neither the main thread nor a stopped rank 0 can silence them:

    messenger   tells the other ranks where this one is, each second or so, through the TCP store in which the ranks
                met, and reads what they tell once this one is late. It may block: rank 0 keeps the store.
    judge       never waits for anybody. Once this rank has been at one place for too long it names the rank that is
                missing, writes the stacks of all threads and ends the process.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import sys
import threading
import time
from datetime import timedelta
from types import TracebackType
from typing import NamedTuple, NoReturn, Self

from torch import distributed

from trainer.distributed import World
from trainer.runs.folder import RunFolder

log = logging.getLogger(__name__)

EXIT_CODE = 3
_SLOW_PLACES = {"start", "epoch", "validate", "test"}
_SLOW = 10
"""How much longer these, and the first step, may take."""
_GRACE = 5.0
"""Seconds for a rank to end by itself once a reason to end is known."""


class Beat(NamedTuple):
    """What a rank tells the others of itself."""

    number: int
    """Of the beat, so that one who stopped telling shows."""
    step: int
    place: str
    waiting: bool
    idle: float
    """Seconds at this place."""

    def __str__(self) -> str:
        return f"step {self.step} ({self.place})"


class Verdict(NamedTuple):
    """Why the run ends."""

    ranks: list[int]
    """Whose fault it is."""
    reason: str


class Watchdog:
    """Watches this rank while the context lasts; an error that leaves it is told to the other ranks.

    Args:
        timeout: seconds at one place after which the run ends.
    """

    def __init__(self, world: World, run: RunFolder, timeout: float) -> None:
        self._world, self._run, self._timeout = world, run, timeout
        self._heartbeat = world.heartbeat
        self._tick = min(0.5, timeout / 20)
        self._done = threading.Event()
        self._leaving = threading.Event()
        self._curious = threading.Event()
        self._seen: dict[int, tuple[Beat, float]] = {}  # the last beat of each rank, and when its count last changed
        self._asked = 0.0  # when the others' beats were last read
        self._first_step = 0
        self._ending = threading.Lock()
        self._verdict: Verdict | None = None
        self._told: Verdict | None = None  # what the store holds

    def __enter__(self) -> Self:
        for work in (self._messages, self._judge):
            threading.Thread(target=work, name=f"watchdog{work.__name__}", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or self._world.size == 1:
            self._done.set()
            return
        if _is_loss_of_a_rank(error):
            self._end(self._find_out(error))
        self._leaving.set()
        here = f"step {self._heartbeat.step} ({self._heartbeat.place})"
        reason = f"rank {self._world.rank} failed in {here}: {type(error).__name__}: {' '.join(str(error).split())}"
        self._verdict = Verdict([self._world.rank], reason)
        self._linger()

    def _messages(self) -> None:
        try:
            self._talk()
        except (distributed.DistError, RuntimeError):
            return  # the store is gone with rank 0, or closed at the end of the run; the judge sees that nothing comes

    def _talk(self) -> None:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        patience = timedelta(seconds=max(5.0, self._timeout))
        store = distributed.TCPStore(address, port, is_master=False, timeout=patience)  # type: ignore[attr-defined]
        everyone = [f"watchdog/beat/{rank}" for rank in range(self._world.size)]
        number = 0
        while not self._done.is_set():
            number += 1
            now = self._heartbeat
            beat = Beat(number, now.step, now.place, now.waiting, time.monotonic() - now.since)
            store.set(everyone[self._world.rank], json.dumps(beat))
            if self._verdict and not self._told:
                store.compare_set("watchdog/end", "", json.dumps(self._verdict))
            if store.check(["watchdog/end"]):
                self._told = Verdict(*json.loads(store.get("watchdog/end")))
            if self._curious.is_set():
                for rank, text in enumerate(store.multi_get(everyone)):
                    self._note(rank, Beat(*json.loads(text)))
                self._asked = time.monotonic()
            self._done.wait(self._tick)

    def _note(self, rank: int, beat: Beat) -> None:
        known = self._seen.get(rank)
        changed = time.monotonic() if known is None or known[0].number != beat.number else known[1]
        self._seen[rank] = (beat, changed)

    def _judge(self) -> None:
        told_at, before = None, time.monotonic()
        while not self._done.wait(self._tick / 2):
            now = time.monotonic()
            if now - before > 5 * self._tick:
                self._heartbeat.since += now - before  # this process itself was stopped, say by `scontrol suspend`
            before = now
            idle, allowed = now - self._heartbeat.since, self._allowed()
            if idle > allowed / 2:
                self._curious.set()
            if self._told and told_at is None:
                told_at = now
            if self._told and told_at and now - told_at > (2 if self._leaving.is_set() else 1) * _GRACE:
                self._end(self._told)
            if idle > allowed and not self._leaving.is_set():
                self._end(self._missing(idle))

    def _allowed(self) -> float:
        step = self._heartbeat.step
        self._first_step = self._first_step or step
        slow = self._heartbeat.place in _SLOW_PLACES or step == self._first_step
        return self._timeout * (_SLOW if slow else 1)

    def _missing(self, idle: float) -> Verdict:
        """Which rank the others wait for, as far as this one knows."""
        here = f"step {self._heartbeat.step} ({self._heartbeat.place})"
        if self._world.size == 1:
            return Verdict([0], f"no progress for {idle:.0f} s in {here}")
        now = time.monotonic()
        waits = f"rank {self._world.rank} waits for it in {here}"
        if now - self._asked > 5 * self._tick:
            return Verdict([0], f"rank 0, where the ranks meet, gives no sign; {waits}")
        beats = {rank: beat for rank, (beat, _) in self._seen.items()}
        silent = [rank for rank, (_, changed) in self._seen.items() if now - changed > 5 * self._tick]
        if silent:
            lost = "; ".join(f"rank {rank} gives no sign, it was last in {beats[rank]}" for rank in silent)
            return Verdict(silent, f"{lost}; {waits}")
        busy = [rank for rank, beat in beats.items() if not beat.waiting] or list(beats)
        first = min(beats[rank].step for rank in busy)
        late = [rank for rank in busy if beats[rank].step == first]
        stuck = "; ".join(f"rank {rank} is stuck in {beats[rank]} for {beats[rank].idle:.0f} s" for rank in late)
        return Verdict(late, f"{stuck}; {waits}" if self._world.rank not in late else stuck)

    def _find_out(self, error: BaseException) -> Verdict:
        """Why a collective failed: what a rank said when it ended, or which one gives no sign."""
        self._curious.set()
        end = time.monotonic() + _GRACE + 6 * self._tick
        while time.monotonic() < end and not self._told:
            time.sleep(self._tick / 2)
            lost = self._missing(0.0)
            if time.monotonic() > end - _GRACE and "no sign" in lost.reason:
                return lost
        return self._told or Verdict([], f"rank {self._world.rank} lost the others: {error}")

    def _end(self, verdict: Verdict) -> NoReturn:
        self._ending.acquire()  # the other thread that gets here waits for the end of the process
        self._verdict = self._told or verdict
        with self._run.stacks(self._world.rank).open("w") as file:
            print(f"rank {self._world.rank}, {self._verdict.reason}\n", file=file, flush=True)
            faulthandler.dump_traceback(file=file, all_threads=True)
        # One rank tells it: the first that has nothing to do with it.
        if self._world.rank == next(rank for rank in range(self._world.size + 1) if rank not in self._verdict.ranks):
            line = (
                f"{self._verdict.reason}; stacks are in {self._run.stacks(self._world.rank).parent}/stacks-rank-*.txt"
            )
            if self._world.is_main:
                log.error("error: %s", line)
            else:
                print(f"error: {line}", file=sys.stderr, flush=True)
        self._linger()
        os._exit(EXIT_CODE)

    def _linger(self) -> None:
        """Time for the messenger to tell the others, and on rank 0 for them to read it before the store goes."""
        time.sleep(self._tick * (4 if self._world.is_main else 2))


def _is_loss_of_a_rank(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone."""
    if isinstance(error, distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "NCCL", "HCCL"))
