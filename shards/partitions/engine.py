"""The interface of an engine, which reads events and holds them in parts: `LocalEngine` or `SparkEngine`."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import polars as pl

from shards.partitions.events import Events

EVENTS_IN_MEMORY = 4_000_000
"""More events than this are written to files: about 0.6 GB. Shared by all processes."""

PartT = TypeVar("PartT")
OtherT = TypeVar("OtherT")
ResultT = TypeVar("ResultT")


class Parts(ABC, Generic[PartT]):
    """Parts of a whole, in the order of their users.

    A function that is applied to a part may depend on nothing but the part and what is bound to it, because it may run
    in another process, and more than once. It returns what it finds out.
    """

    @abstractmethod
    def __len__(self) -> int:
        """Number of parts."""

    def __iter__(self) -> Iterator[PartT]:
        return self.stream(identity)

    @abstractmethod
    def stream(self, function: Callable[[PartT], ResultT], what: str = "") -> Iterator[ResultT]:
        """The results of a function, in order; a few of them at a time are in memory.

        Args:
            what: name of the step, for its progress; empty: the step is too short to report.
        """

    def each(self, function: Callable[[PartT], ResultT], what: str = "") -> Iterator[ResultT]:
        """As `stream`, for small results."""
        return self.stream(function, what)

    @abstractmethod
    def map(
        self, function: Callable[[PartT], tuple[OtherT, ResultT]], what: str, collect: Callable[[ResultT], None]
    ) -> "Parts[OtherT]":
        """The changed parts, which replace these where they are in files: use these no more.

        Args:
            function: returns the new part, and what it found out.
            what: name of the step, for its progress.
            collect: called with what was found out, in the order of the parts.
        """


def identity(part: PartT) -> PartT:
    """The part as it is."""
    return part


class Read(Protocol):
    """Reads files as frames of events (`read_events`)."""

    def __call__(self, paths: tuple[Path, ...], *, counts: Counter[str]) -> Iterator[pl.DataFrame]: ...


class Engine(Protocol):
    """Reads events and holds them in parts."""

    def partitioned(
        self, read: Read, paths: tuple[Path, ...], seed: int, counts: Counter[str], order_option: str | None
    ) -> tuple[Parts[Events], pl.Series]:
        """The events of all files in parts, and the sorted raw ids of all items; without events, neither.

        Args:
            counts: gets what was dropped and changed while reading, by reason.
            order_option: the option that depends on the order of all files, which are then read in one go; None: each
                file may be read by itself.

        Raises:
            DatasetError: bad input, or an option that this engine cannot do.
        """
