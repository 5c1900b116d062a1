"""Builds on Spark, for logs that are too large for a machine.

Spark reads the files, shuffles the events to the parts of their users, and runs the functions of `shards.partitions` on
the parts: the code of a build on one machine, so that the same input and seed give the same bytes. The driver gets
counts of items, a length per user, and, in the end, the finished sequences, which it writes. Chosen over queries that
two engines run alike (through ibis): those would need the order of ties, the splits and the random draws a second time,
in SQL.
"""

import contextlib
import logging
import os
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from shards.hashing import hash_strings, stream_key
from shards.manifest import DatasetError
from shards.partitions.blocks import encode, places
from shards.partitions.engine import EVENTS_IN_MEMORY, OtherT, Parts, PartT, Read, ResultT
from shards.partitions.events import Events
from shards.splitmix import UInt64Array

if TYPE_CHECKING:
    from pyspark import RDD
    from pyspark.sql import SparkSession

log = logging.getLogger("shards")

_PART_BYTES = 32 << 20
"""Bytes of input files for each part: about four million events of parquet."""
_MAX_BITS = 12
_PARTS_AT_ONCE = 64
"""At least: parts whose small results the driver gets together."""
_PARTS_OF_A_BUCKET = 4
"""In bits: there is a bucket of item ids for 16 parts, so that no task has all ids of a large log."""
_SECONDS_TO_REPORT = 10.0


@contextlib.contextmanager
def spark_session(master: str | None) -> "Iterator[SparkSession]":
    """A session, which is stopped in the end.

    Args:
        master: address of the cluster; None: that of Spark's own configuration, or all cores of this machine.

    Raises:
        DatasetError: pyspark or Java is missing, or the cluster cannot be reached.
    """
    try:
        from pyspark.sql import SparkSession
    except ImportError:
        raise DatasetError("--engine spark needs pyspark: pip install 'llm-srec-trainer[spark]'") from None
    if not (os.environ.get("JAVA_HOME") or shutil.which("java")):
        raise DatasetError("--engine spark needs Java 17 or later: install it, or set JAVA_HOME")
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    builder = (
        SparkSession.builder.appName("llm-srec shards")
        # A task is single-threaded, like Spark's: polars would use all cores of the node in each.
        .config("spark.executorEnv.POLARS_MAX_THREADS", "1")
        # The driver bounds by itself what it gets at once, and a temporal split needs the times of all events.
        .config("spark.driver.maxResultSize", "0")
        .config("spark.ui.showConsoleProgress", str(sys.stderr.isatty()).lower())
    )
    with _spark_errors(f"--spark-master {master or 'of the configuration'}"):
        session = (builder.master(master) if master else builder).getOrCreate()
    try:
        session.sparkContext.setLogLevel("FATAL")
        logging.getLogger("py4j").setLevel(logging.WARNING)
        yield session
    finally:
        session.stop()


class SparkEngine:
    """Builds on Spark; each file is read by a task."""

    def __init__(self, session: "SparkSession") -> None:
        self._context = session.sparkContext

    def partitioned(
        self, read: Read, paths: tuple[Path, ...], seed: int, counts: Counter[str], order_option: str | None
    ) -> "tuple[SparkParts[Events], pl.Series]":
        """See `Engine.partitioned`."""
        if order_option is not None:
            raise DatasetError(
                f"{order_option} reads all files in order, Spark each by itself: build without --engine spark"
            )
        context = self._context
        # Executors have working folders of their own.
        paths = tuple(path.absolute() for path in paths)
        size = sum(path.stat().st_size for path in paths)
        bits = min(max(size // _PART_BYTES, 2 * context.defaultParallelism, 2).bit_length(), _MAX_BITS)
        log.info("spark: %d parts at %s", 1 << bits, context.master)
        # Behind the partitions of the events come one of reports, and those of item ids. Spark keeps what it shuffles,
        # so that files are read once.
        reports, buckets = 1 << bits, 1 << _bucket_bits(bits)
        pieces = context.parallelize(list(enumerate(paths)), len(paths)).flatMap(
            partial(_cut, read=read, seed=seed, bits=bits)
        )
        shuffled = pieces.partitionBy(reports + 1 + buckets, int).values()
        with _spark_errors(), _reported("reading"):
            found: list[_Report] = context.runJob(shuffled, list, [reports])
            for report in sorted(found, key=attrgetter("number")):
                if report.error is not None:
                    raise DatasetError(report.error)
                counts.update(report.counts)
            for note in dict.fromkeys(note for report in found for note in report.notes):
                log.info("%s", note)
            ids = context.runJob(shuffled, _distinct, [reports + 1 + bucket for bucket in range(buckets)])
        items = pl.concat(ids).sort()
        parts = shuffled.mapPartitionsWithIndex(partial(_events, num_parts=reports, items=items, seed=seed))
        return SparkParts(parts), items


class SparkParts(Parts[PartT]):
    """Parts that Spark holds, at most one in each partition.

    Args:
        held: the data that the parts are made from, which executors keep until the parts are replaced.
    """

    def __init__(self, parts: "RDD[PartT]", held: "RDD[Any] | None" = None) -> None:
        self._parts = parts
        self._held = held

    def __len__(self) -> int:
        return int(self._parts.getNumPartitions())

    def stream(self, function: Callable[[PartT], ResultT], what: str = "") -> Iterator[ResultT]:
        """See `Parts.stream`."""
        results = _kept(self._parts.map(function))
        try:
            with _spark_errors():
                with _reported(what):
                    results.count()  # all at once: the iterator alone would compute one partition after the other
                yield from results.toLocalIterator(prefetchPartitions=True)
        finally:
            results.unpersist()

    def each(self, function: Callable[[PartT], ResultT], what: str = "") -> Iterator[ResultT]:
        """See `Parts.each`."""
        with _spark_errors(), _reported(what):
            yield from _in_blocks(self._parts.map(function))

    def map(
        self, function: Callable[[PartT], tuple[OtherT, ResultT]], what: str, collect: Callable[[ResultT], None]
    ) -> "SparkParts[OtherT]":
        """See `Parts.map`."""
        changed = _kept(self._parts.map(function))
        with _spark_errors(), _reported(what):
            results: Iterator[ResultT] = _in_blocks(changed.map(itemgetter(1)))
            for result in results:
                collect(result)
        if self._held is not None:
            self._held.unpersist()
        return SparkParts(changed.map(itemgetter(0)), changed)


@dataclass(frozen=True)
class _Report:
    """Outcome of reading a file: dropped rows by reason, notes for the user, and an error of the input.

    The driver raises the error, because Spark would try the task four times.
    """

    number: int
    counts: Counter[str]
    notes: list[str]
    error: str | None


def _cut(
    numbered: tuple[int, Path], read: Read, seed: int, bits: int
) -> Iterator[tuple[int, pl.DataFrame | pl.Series | _Report]]:
    """The events of a file, as frames with the partitions of their parts; then its item ids, and a report."""
    number, path = numbered
    counts: Counter[str] = Counter()
    items = pl.Series("item", [], pl.String)
    held: list[pl.DataFrame] = []
    error = None
    with _noted() as notes:
        try:
            for frame in read((path,), counts=counts):
                items = pl.concat([items, frame["item"]]).unique()
                held.append(frame)
                if sum(map(len, held)) > EVENTS_IN_MEMORY:
                    yield from _by_key(pl.concat(held), "user", stream_key(seed, "users"), bits)
                    held = []
            if held:
                yield from _by_key(pl.concat(held), "user", stream_key(seed, "users"), bits)
        except DatasetError as found:
            error = str(found)
    yield 1 << bits, _Report(number, counts, notes, error)
    for bucket, ids in _by_key(items.to_frame(), "item", stream_key(seed, "items"), _bucket_bits(bits)):
        yield (1 << bits) + 1 + bucket, ids["item"]


def _bucket_bits(part_bits: int) -> int:
    return max(part_bits - _PARTS_OF_A_BUCKET, 0)


def _by_key(frame: pl.DataFrame, column: str, key: np.uint64, bits: int) -> Iterator[tuple[int, pl.DataFrame]]:
    """The rows by the first bits of the hash of a column."""
    ids = frame[column].unique()
    keys: UInt64Array = hash_strings(ids, key)
    # In two steps: for a single part, one shift by all 64 bits would leave the number as it is.
    parts = pl.DataFrame({column: ids, "part": (keys >> np.uint64(1) >> np.uint64(63 - bits)).astype(np.uint16)})
    for part, piece in frame.join(parts, on=column).partition_by("part", as_dict=True, include_key=False).items():
        yield int(part[0]), piece


def _distinct(ids: Iterable[pl.Series]) -> list[pl.Series]:
    """The distinct ids of a bucket."""
    found = pl.Series("item", [], pl.String)
    for some in ids:
        found = pl.concat([found, some]).unique()
    return [found]


def _events(
    partition: int, pieces: Iterable[pl.DataFrame], num_parts: int, items: pl.Series, seed: int
) -> list[Events]:
    """The events of a part, with the numbers of users and of items."""
    frames = list(pieces) if partition < num_parts else []
    if not frames:
        return []
    events, present = encode(pl.concat(frames), seed)
    item_E = places(present, items)[events.frame["item"].to_numpy()]
    return [Events(events.frame.with_columns(pl.Series("item", item_E)), events.users, events.user_keys)]


def _kept(parts: "RDD[ResultT]") -> "RDD[ResultT]":
    """The same, but once computed, executors keep it on their disks."""
    from pyspark import StorageLevel

    return parts.persist(StorageLevel.DISK_ONLY)


def _in_blocks(results: "RDD[ResultT]") -> Iterator[ResultT]:
    """The results in order, a block of partitions at a time, so that the driver needs memory for a block."""
    context, number = results.context, results.getNumPartitions()
    block = max(_PARTS_AT_ONCE, 4 * context.defaultParallelism)
    for first in range(0, number, block):
        yield from context.runJob(results, list, list(range(first, min(first + block, number))))


@contextlib.contextmanager
def _noted() -> Iterator[list[str]]:
    """The log lines of this package, which nobody would see in an executor."""
    notes: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: notes.append(record.getMessage())  # type: ignore[method-assign]
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield notes
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


@contextlib.contextmanager
def _spark_errors(what: str = "Spark failed") -> Iterator[None]:
    """Turn errors of Spark into one line, with the cause.

    Raises:
        DatasetError: Spark failed.
    """
    from py4j.protocol import Py4JError
    from pyspark.errors import PySparkException

    try:
        yield
    except (Py4JError, PySparkException) as error:
        raise DatasetError(f"{what}: {_cause(error)}") from None


def _cause(error: Exception) -> str:
    """The cause in one line: of an error in a task, the last line of Python's traceback; else the first line."""
    java = getattr(error, "java_exception", None)
    text = str(error if java is None else java.getMessage())
    raised = re.findall(r"^(?:\w+\.)*\w*(?:Error|Exception|Interrupt): .*$", text, re.MULTILINE)
    line = raised[-1] if "Traceback (most recent call last)" in text and raised else text.strip().partition("\n")[0]
    return str(line)[:300]


@contextlib.contextmanager
def _reported(what: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    if what and time.monotonic() - began > _SECONDS_TO_REPORT:
        log.info("%s: done in %.0f s", what, time.monotonic() - began)
