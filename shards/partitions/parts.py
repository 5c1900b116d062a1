"""Parts on this machine: all of them in memory, or each in a file, which several processes work on."""

import logging
import pickle
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import cast

import polars as pl

from shards.formats.parquet import parquet_rows
from shards.manifest import DatasetError
from shards.partitions.engine import OtherT, Parts, PartT, ResultT, identity

log = logging.getLogger("shards")

_SECONDS_BETWEEN_REPORTS = 10.0


@dataclass(frozen=True)
class Pool:
    """Processes that share the work."""

    executor: Executor
    processes: int


class LocalParts(Parts[PartT]):
    """Parts on this machine.

    Args:
        parts: the parts themselves, or the files that hold them (`write_part`).
        pool: changes the parts in files; None: this process does.
    """

    def __init__(self, parts: Sequence[PartT | Path], pool: Pool | None = None) -> None:
        self._parts = tuple(parts)
        self._pool = pool

    def __len__(self) -> int:
        return len(self._parts)

    def stream(self, function: Callable[[PartT], ResultT], what: str = "") -> Iterator[ResultT]:
        """See `Parts.stream`."""
        if self._pool is None or function is identity:
            yield from run_in_order(None, [partial(_applied, part, function) for part in self._parts], what)
            return
        # Through files: arrays take several times as long through the pipe of a pool.
        for path in self._run(partial(_write_result, function=function), what):
            yield _loaded(path)
            path.unlink()

    def each(self, function: Callable[[PartT], ResultT], what: str = "") -> Iterator[ResultT]:
        """See `Parts.each`."""
        return self._run(partial(_applied, function=function), what)

    def map(
        self, function: Callable[[PartT], tuple[OtherT, ResultT]], what: str, collect: Callable[[ResultT], None]
    ) -> "LocalParts[OtherT]":
        """See `Parts.map`."""
        changed: list[OtherT | Path] = []
        work: Callable[[PartT | Path], tuple[OtherT | Path, ResultT]] = partial(_replaced, function=function)
        for part, found in self._run(work, what):
            collect(found)
            changed.append(part)
        return LocalParts(changed, self._pool)

    def _run(self, work: Callable[[PartT | Path], ResultT], what: str) -> Iterator[ResultT]:
        return run_in_order(self._pool, [partial(work, part) for part in self._parts], what)


def _applied(part: PartT | Path, function: Callable[[PartT], ResultT]) -> ResultT:
    return function(_loaded(part))


def _write_result(part: PartT | Path, function: Callable[[PartT], object]) -> Path:
    """Write the result for a part that is in a file to another one."""
    assert isinstance(part, Path), "a pool works on files"
    result = part.with_name(f"{part.name}.result")
    write_part(result, function(_loaded(part)))
    return result


def _replaced(part: PartT | Path, function: Callable[[PartT], tuple[OtherT, ResultT]]) -> tuple[OtherT | Path, ResultT]:
    new, found = function(_loaded(part))
    if not isinstance(part, Path):
        return new, found
    write_part(part, new)
    return part, found


def run_in_order(
    pool: Pool | None, tasks: Sequence[Callable[[], ResultT]], what: str, units: str = "parts"
) -> Iterator[ResultT]:
    """The results of the tasks, in their order; what takes long is reported.

    Args:
        pool: runs a few tasks ahead; None: this process runs them.
        what: name of the step; empty: it is not reported.

    Raises:
        DatasetError: a task raised it, or a process of the pool was killed.
    """
    report = _Report(what, units, len(tasks))
    for result in map(_call, tasks) if pool is None else _run_ahead(pool, tasks):
        yield result
        report.add(1)


def _run_ahead(pool: Pool, tasks: Sequence[Callable[[], ResultT]]) -> Iterator[ResultT]:
    waiting: deque[Future[ResultT]] = deque()
    try:
        for task in tasks:
            waiting.append(pool.executor.submit(task))
            if len(waiting) >= 2 * pool.processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenExecutor:
        raise DatasetError(
            "a process of the build was killed, probably because the memory was full: lower --workers, or give the job "
            "more memory"
        ) from None


def _call(task: Callable[[], ResultT]) -> ResultT:
    return task()


def write_part(path: Path, part: object) -> None:
    """Write a part to a file of this build's own folder."""
    # A pickle takes frames and arrays as they are. Nobody else writes to the folder, and it is gone after the build.
    with path.open("wb") as file:
        pickle.dump(part, file, protocol=5)


def read_part(path: Path) -> object:
    """Read what `write_part` wrote."""
    with path.open("rb") as file:
        return pickle.load(file)


def _loaded(part: PartT | Path) -> PartT:
    return cast(PartT, read_part(part)) if isinstance(part, Path) else part


def shown_reading(frames: Iterable[pl.DataFrame], paths: Sequence[Path]) -> Iterator[pl.DataFrame]:
    """The frames of these files; reading that takes long is reported, of parquet files with the time left."""
    rows = sum(map(parquet_rows, paths)) if all(path.suffix == ".parquet" for path in paths) else None
    report = _Report("reading", "events", rows)
    for frame in frames:
        yield frame
        report.add(frame.height)


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
