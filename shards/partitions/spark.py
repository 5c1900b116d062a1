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
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic

import numpy as np
import polars as pl

from shards.hashing import hash_strings, stream_key
from shards.manifest import DatasetError
from shards.partitions.blocks import encode
from shards.partitions.engine import Read
from shards.partitions.events import Events
from shards.partitions.local import EVENTS_IN_MEMORY
from shards.partitions.parts import FactT, OtherT, Parts, PartT, ResultT
from shards.splitmix import UInt64Array

if TYPE_CHECKING:
    from pyspark import RDD
    from pyspark.sql import SparkSession

log = logging.getLogger("shards")

_PART_BYTES = 32 << 20
"""Bytes of input files for each part: about four million events of parquet."""
_MAX_BITS = 12
_PARTS_AT_ONCE = 64
"""At least: parts whose facts the driver gets together."""
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
        from py4j.protocol import Py4JError
        from pyspark.errors import PySparkException
        from pyspark.sql import SparkSession
    except ImportError:
        raise DatasetError("--engine spark needs pyspark: pip install 'llm-srec-trainer[spark]'") from None
    if not (os.environ.get("JAVA_HOME") or shutil.which("java")):
        raise DatasetError("--engine spark needs Java 17 or later: install it, or set JAVA_HOME")
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    # A task is single-threaded, like Spark's: polars would use all cores of the node in each.
    builder = (
        SparkSession.builder.appName("llm-srec shards")
        .config("spark.executorEnv.POLARS_MAX_THREADS", "1")
        .config("spark.ui.showConsoleProgress", str(sys.stderr.isatty()).lower())
    )
    try:
        session = (builder.master(master) if master else builder).getOrCreate()
    except (Py4JError, PySparkException) as error:
        raise DatasetError(f"--spark-master {master or 'of the configuration'}: {_first_line(error)}") from None
    try:
        session.sparkContext.setLogLevel("ERROR")
        logging.getLogger("py4j").setLevel(logging.WARNING)
        yield session
    finally:
        session.stop()


class SparkEngine:
    """Builds on Spark; each file is read by a task."""

    def __init__(self, session: "SparkSession") -> None:
        self._context = session.sparkContext

    def partitioned(
        self, read: Read, paths: tuple[Path, ...], seed: int, counts: Counter[str], together: str | None
    ) -> "tuple[SparkParts[Events], pl.Series]":
        """See `Engine.partitioned`."""
        if together is not None:
            raise DatasetError(
                f"{together} reads all files in order, Spark each by itself: build without --engine spark"
            )
        context = self._context
        size = sum(path.stat().st_size for path in paths)
        bits = min(max(size // _PART_BYTES, 2 * context.defaultParallelism, 2).bit_length(), _MAX_BITS)
        log.info("spark: %d parts at %s", 1 << bits, context.master)
        pieces = context.parallelize(list(enumerate(paths)), len(paths)).flatMap(
            partial(_cut, read=read, seed=seed, bits=bits)
        )
        # The last partition gets what the tasks found out. Spark keeps what it shuffles, so that files are read once.
        facts = 1 << bits
        shuffled = pieces.partitionBy(facts + 1, partial(_place, facts=facts)).values()
        with _reported("reading"):
            found = _run(lambda: context.runJob(shuffled, list, [facts]))
        read_files = sorted(found, key=lambda file: file.number)
        for file in read_files:
            if file.error is not None:
                raise DatasetError(file.error)
            counts.update(file.counts)
        items = pl.concat([file.items for file in read_files], rechunk=True).unique().sort()
        parts = shuffled.mapPartitionsWithIndex(partial(_events, facts=facts, items=items, seed=seed))
        return SparkParts(parts), items


class SparkParts(Parts[PartT]):
    """Parts that Spark holds, at most one in each partition.

    Args:
        held: what the parts are made from, and is kept until they are replaced.
    """

    def __init__(self, parts: "RDD[PartT]", held: "RDD[Any] | None" = None) -> None:
        self._parts = parts
        self._held = held

    def __len__(self) -> int:
        return int(self._parts.getNumPartitions())

    def stream(self, look: Callable[[PartT], FactT], what: str = "") -> Iterator[FactT]:
        """See `Parts.stream`."""
        # One partition after the other would be computed in turn, so all are computed first.
        outcomes = _outcomes(self._parts, look)
        with _reported(what):
            _run(outcomes.count)
        for outcome in outcomes.toLocalIterator(prefetchPartitions=True):
            yield outcome.result()
        outcomes.unpersist()

    def each(self, look: Callable[[PartT], FactT], what: str = "") -> Iterator[FactT]:
        """See `Parts.each`."""
        with _reported(what):
            yield from _taken(self._parts.map(partial(_attempt, work=look)))

    def map(
        self, change: Callable[[PartT], tuple[OtherT, FactT]], what: str, take: Callable[[FactT], None]
    ) -> "SparkParts[OtherT]":
        """See `Parts.map`."""
        outcomes = _outcomes(self._parts, change)
        with _reported(what):
            facts: Iterator[FactT] = _taken(outcomes.map(_fact))
            for fact in facts:
                take(fact)
        if self._held is not None:
            self._held.unpersist()
        return SparkParts(outcomes.map(_new_part), outcomes)


@dataclass(frozen=True)
class _Outcome(Generic[ResultT]):
    """What a function gave for a part, or its error, which the driver raises: Spark would try bad input four times."""

    value: ResultT | None
    error: str | None = None

    def result(self) -> ResultT:
        if self.error is not None:
            raise DatasetError(self.error)
        return self.value  # type: ignore[return-value]


@dataclass(frozen=True)
class _File:
    """What the reading of a file found out."""

    number: int
    counts: Counter[str]
    items: pl.Series
    error: str | None


def _cut(numbered: tuple[int, Path], read: Read, seed: int, bits: int) -> Iterator[tuple[int, pl.DataFrame | _File]]:
    """The events of a file, as frames with the numbers of their parts; in the end, what was found out, with -1."""
    number, path = numbered
    counts: Counter[str] = Counter()
    items = pl.Series("item", [], pl.String)
    held: list[pl.DataFrame] = []
    error = None
    try:
        for frame in read((path,), counts=counts):
            items = pl.concat([items, frame["item"]]).unique()
            held.append(frame)
            if sum(map(len, held)) > EVENTS_IN_MEMORY:
                yield from _by_part(pl.concat(held), seed, bits)
                held = []
        if held:
            yield from _by_part(pl.concat(held), seed, bits)
    except DatasetError as found:
        error = str(found)
    yield -1, _File(number, counts, items, error)


def _by_part(frame: pl.DataFrame, seed: int, bits: int) -> Iterator[tuple[int, pl.DataFrame]]:
    users = frame["user"].unique()
    keys: UInt64Array = hash_strings(users, stream_key(seed, "users"))
    parts = pl.DataFrame({"user": users, "part": (keys >> np.uint64(64 - bits)).astype(np.uint16)})
    for key, piece in frame.join(parts, on="user").partition_by("part", as_dict=True, include_key=False).items():
        yield int(key[0]), piece


def _place(part: int, facts: int) -> int:
    """Partition of the pieces of a part, and of what was found out (-1)."""
    return facts if part < 0 else part


def _events(partition: int, pieces: Iterable[pl.DataFrame], facts: int, items: pl.Series, seed: int) -> list[Events]:
    """The events of a part, with the numbers of users and of items."""
    frames = [] if partition == facts else list(pieces)
    if not frames:
        return []
    events, present = encode(pl.concat(frames), seed)
    places = pl.DataFrame({"item": items}).with_row_index("place")
    code_N = pl.DataFrame({"item": present}).join(places, on="item", how="left", maintain_order="left")["place"]
    frame = events.frame.with_columns(code_N.gather(events.frame["item"]).alias("item"))
    return [Events(frame, events.users, events.user_keys)]


def _outcomes(parts: "RDD[PartT]", work: Callable[[PartT], ResultT]) -> "RDD[_Outcome[ResultT]]":
    """What the function gives for each part; once computed, executors keep it on their disks."""
    from pyspark import StorageLevel

    return parts.map(partial(_attempt, work=work)).persist(StorageLevel.DISK_ONLY)


def _taken(outcomes: "RDD[_Outcome[ResultT]]") -> Iterator[ResultT]:
    """The results in order, a block of partitions at a time, so that the driver needs memory for a block."""
    context, number = outcomes.context, outcomes.getNumPartitions()
    block = max(_PARTS_AT_ONCE, 4 * context.defaultParallelism)
    for first in range(0, number, block):
        partitions = list(range(first, min(first + block, number)))
        for outcome in _run(partial(context.runJob, outcomes, list, partitions)):
            yield outcome.result()


def _attempt(part: PartT, work: Callable[[PartT], ResultT]) -> _Outcome[ResultT]:
    try:
        return _Outcome(work(part))
    except DatasetError as error:
        return _Outcome(None, str(error))


def _fact(outcome: _Outcome[tuple[OtherT, FactT]]) -> _Outcome[FactT]:
    return _Outcome(None, outcome.error) if outcome.value is None else _Outcome(outcome.value[1])


def _new_part(outcome: _Outcome[tuple[OtherT, FactT]]) -> OtherT:
    return outcome.result()[0]


def _run(job: Callable[[], ResultT]) -> ResultT:
    from py4j.protocol import Py4JError

    try:
        return job()
    except Py4JError as error:
        raise DatasetError(f"Spark failed: {_first_line(error)}: see the logs of its executors") from None


def _first_line(error: Exception) -> str:
    """The cause, without Java's stack."""
    java = getattr(error, "java_exception", None)
    return str(error if java is None else java.getMessage()).strip().partition("\n")[0][:300]


@contextlib.contextmanager
def _reported(what: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    if what and time.monotonic() - began > _SECONDS_TO_REPORT:
        log.info("%s: done in %.0f s", what, time.monotonic() - began)
