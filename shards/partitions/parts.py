"""A whole that is too large for the memory, in parts: all of them in memory, or each in a file."""

import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Generic, TypeVar, cast

import polars as pl
from tqdm import tqdm

from shards.formats.parquet import parquet_rows

PartT = TypeVar("PartT")
OtherT = TypeVar("OtherT")

_QUIET_SECONDS = 5.0


class Parts(Generic[PartT]):
    """Parts in the order of their users.

    Args:
        parts: the parts themselves, or the files that hold them (`write_part`).
    """

    def __init__(self, parts: Sequence[PartT | Path]) -> None:
        self._parts = tuple(parts)

    def __len__(self) -> int:
        return len(self._parts)

    def __iter__(self) -> Iterator[PartT]:
        for part in self._parts:
            yield _loaded(part)

    def map(self, change: Callable[[PartT], OtherT], what: str) -> "Parts[OtherT]":
        """The changed parts. Those in files replace these parts, which are lost.

        Args:
            what: name of the step, for its progress.
        """
        changed: list[OtherT | Path] = []
        for part in progress(self._parts, what):
            new = change(_loaded(part))
            if isinstance(part, Path):
                write_part(part, new)
                changed.append(part)
            else:
                changed.append(new)
        return Parts(changed)


def progress(parts: Sequence[PartT] | Parts[PartT], what: str) -> Iterable[PartT]:
    """The parts; if they take longer than a few seconds, their progress and the time left are on stderr."""
    return tqdm(parts, what, unit="part", delay=_QUIET_SECONDS, leave=False)


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
    """The frames of these files; if they take long, their rows and, of parquet files, the time left are on stderr."""
    rows = sum(map(parquet_rows, paths)) if all(path.suffix == ".parquet" for path in paths) else None
    with tqdm(desc="reading", total=rows, unit=" events", unit_scale=True, delay=_QUIET_SECONDS, leave=False) as shown:
        for frame in frames:
            yield frame
            shown.update(frame.height)
