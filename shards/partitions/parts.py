"""A whole that is too large for the memory, in parts: all of them in memory, each in a file, or in another engine."""

import logging
import pickle
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar, cast

import polars as pl

from shards.formats.parquet import parquet_rows

PartT = TypeVar("PartT")
OtherT = TypeVar("OtherT")
FactT = TypeVar("FactT")
ResultT = TypeVar("ResultT")

log = logging.getLogger("shards")

_SECONDS_BETWEEN_REPORTS = 10.0
_TASKS_AHEAD = 8
"""Of a pool: at least its number of processes, so that none waits; each may hold a part in memory."""


class Parts(ABC, Generic[PartT]):
    """Parts of a whole, in the order of their users.

    Who holds and changes them is an engine's affair: this process (`LocalParts`) or Spark (`spark.SparkParts`). A
    function of a part may depend on nothing but the part and what is bound to it, because it may run elsewhere, and
    more than once; what it finds out comes back as a value.
    """

    @abstractmethod
    def __len__(self) -> int:
        """Number of parts."""

    def __iter__(self) -> Iterator[PartT]:
        return self.stream(itself)

    @abstractmethod
    def stream(self, look: Callable[[PartT], FactT], what: str = "") -> Iterator[FactT]:
        """What `look` makes of each part, in order; a few of them at a time are in memory.

        Args:
            what: name of the step, for its progress; empty: the step is too short to report.
        """

    def each(self, look: Callable[[PartT], FactT], what: str = "") -> Iterator[FactT]:
        """What `look` finds in each part, in order, if that is little."""
        return self.stream(look, what)

    @abstractmethod
    def map(
        self, change: Callable[[PartT], tuple[OtherT, FactT]], what: str, take: Callable[[FactT], None]
    ) -> "Parts[OtherT]":
        """The changed parts, which replace these where they are in files: use these no more.

        Args:
            change: gives the new part, and what it found out.
            what: name of the step, for its progress.
            take: gets what was found out, in the order of the parts.
        """


class LocalParts(Parts[PartT]):
    """Parts on this machine.

    Args:
        parts: the parts themselves, or the files that hold them (`write_part`).
        pool: processes that change the parts in files; None: this process does.
    """

    def __init__(self, parts: Sequence[PartT | Path], pool: Executor | None = None) -> None:
        self._parts = tuple(parts)
        self._pool = pool

    def __len__(self) -> int:
        return len(self._parts)

    def stream(self, look: Callable[[PartT], FactT], what: str = "") -> Iterator[FactT]:
        """See `Parts.stream`."""
        if self._pool is None or look is itself:
            yield from in_order(None, [partial(_looked_at, part, look) for part in self._parts], what)
            return
        # Through files: arrays take several times as long through the pipe of a pool.
        for path in self._done(partial(_result_of, look=look), what):
            yield _loaded(path)
            path.unlink()

    def each(self, look: Callable[[PartT], FactT], what: str = "") -> Iterator[FactT]:
        """See `Parts.each`."""
        return self._done(partial(_looked_at, look=look), what)

    def map(
        self, change: Callable[[PartT], tuple[OtherT, FactT]], what: str, take: Callable[[FactT], None]
    ) -> "LocalParts[OtherT]":
        """See `Parts.map`."""
        changed: list[OtherT | Path] = []
        work: Callable[[PartT | Path], tuple[OtherT | Path, FactT]] = partial(_changed, change=change)
        for part, found in self._done(work, what):
            take(found)
            changed.append(part)
        return LocalParts(changed, self._pool)

    def _done(self, work: Callable[[PartT | Path], ResultT], what: str) -> Iterator[ResultT]:
        return in_order(self._pool, [partial(work, part) for part in self._parts], what)


def _looked_at(part: PartT | Path, look: Callable[[PartT], FactT]) -> FactT:
    return look(_loaded(part))


def _result_of(part: PartT | Path, look: Callable[[PartT], object]) -> Path:
    """The file of what `look` makes of a part in a file."""
    assert isinstance(part, Path), "a pool works on files"
    result = part.with_name(f"{part.name}.result")
    write_part(result, look(_loaded(part)))
    return result


def _changed(part: PartT | Path, change: Callable[[PartT], tuple[OtherT, FactT]]) -> tuple[OtherT | Path, FactT]:
    new, found = change(_loaded(part))
    if not isinstance(part, Path):
        return new, found
    write_part(part, new)
    return part, found


def in_order(
    pool: Executor | None, tasks: Sequence[Callable[[], ResultT]], what: str, units: str = "parts"
) -> Iterator[ResultT]:
    """The results of the tasks, in their order; a few tasks are ahead. Those that take long are reported.

    Args:
        what: name of the step; empty: it is not reported.
    """
    report = _Report(what, units, len(tasks))
    if pool is None:
        for task in tasks:
            yield task()
            report.add(1)
        return
    waiting: deque[Future[ResultT]] = deque()
    for task in tasks:
        waiting.append(pool.submit(task))
        if len(waiting) > _TASKS_AHEAD:
            yield waiting.popleft().result()
            report.add(1)
    while waiting:
        yield waiting.popleft().result()
        report.add(1)


def write_part(path: Path, part: object) -> None:
    """Write a part to a file of this build's own folder."""
    # A pickle takes frames and arrays as they are. Nobody else writes to the folder, and it is gone after the build.
    with path.open("wb") as file:
        pickle.dump(part, file, protocol=5)


def _loaded(part: PartT | Path) -> PartT:
    if not isinstance(part, Path):
        return part
    with part.open("rb") as file:
        return cast(PartT, pickle.load(file))


def shown_reading(frames: Iterable[pl.DataFrame], paths: Sequence[Path]) -> Iterator[pl.DataFrame]:
    """The frames of these files; reading that takes long is reported, of parquet files with the time left."""
    rows = sum(map(parquet_rows, paths)) if all(path.suffix == ".parquet" for path in paths) else None
    report = _Report("reading", "events", rows)
    for frame in frames:
        yield frame
        report.add(frame.height)


def itself(part: PartT) -> PartT:
    """The part as it is, for `Parts.stream`."""
    return part


class _Report:
    """Logs the progress of a step every few seconds; of one without a name, nothing."""

    def __init__(self, what: str, units: str, total: int | None) -> None:
        self._what, self._units, self._total = what, units, total
        self._done = 0
        self._began = self._reported = time.monotonic()

    def add(self, done: int) -> None:
        """Count what was done since the last call."""
        self._done += done
        now = time.monotonic()
        if not self._what or now < self._reported + _SECONDS_BETWEEN_REPORTS or self._done == self._total:
            return
        self._reported = now
        if self._total is None:
            log.info("%s: %s %s", self._what, f"{self._done:,}", self._units)
            return
        left = round((now - self._began) * (self._total - self._done) / self._done)
        log.info(
            "%s: %s of %s %s, %s left", self._what, f"{self._done:,}", f"{self._total:,}", self._units,
            timedelta(seconds=left),
        )  # fmt: skip
