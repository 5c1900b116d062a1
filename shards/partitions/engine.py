"""What a build asks of an engine: `local.LocalEngine`, or `spark.SparkEngine`."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import polars as pl

from shards.partitions.events import Events
from shards.partitions.parts import Parts


class Read(Protocol):
    """Reads files as frames of events (`read_events`)."""

    def __call__(self, paths: tuple[Path, ...], *, counts: Counter[str]) -> Iterator[pl.DataFrame]: ...


class Engine(Protocol):
    """Reads events and holds them in parts."""

    def partitioned(
        self, read: Read, paths: tuple[Path, ...], seed: int, counts: Counter[str], together: str | None
    ) -> tuple[Parts[Events], pl.Series]:
        """The events of all files in parts, and the sorted raw ids of all items.

        Args:
            counts: gets what was dropped and changed while reading, by reason.
            together: the option because of which files must be read together and in order; None: each by itself.

        Raises:
            DatasetError: bad input, or an option that this engine cannot do.
        """
