"""Collects events of any number and cuts them into parts by users: the seeded hashes of a part's users are above those
of the part before, which is the order of users in a dataset."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from shards.hashing import hash_strings, stream_key
from shards.manifest import Stage
from shards.partitions.parts import LocalParts, progress, write_part
from shards.splitmix import UInt64Array

EVENTS_IN_MEMORY = 4_000_000
"""More events than this are written to files: about 0.6 GB."""
_PART_BITS = 6
"""64 parts: of 100 million events, each has 1.6 million."""


@dataclass(frozen=True)
class Events:
    """Interactions of some users.

    `frame` has user:u32 (index into `users`), item:u32 (index into the sorted ids of all items), time:i64 (ms) and, if
    the source has its own split, split:u8 (index into `SPLITS`); with `keep_rows`, row:u32, the place in the input.
    `users` are raw ids in the order of `user_keys`, their seeded hashes; equal hashes in the order of the ids.
    """

    frame: pl.DataFrame
    users: pl.Series
    user_keys: UInt64Array


class Tally:
    """Counts users, items and interactions of parts of a whole."""

    def __init__(self, num_items: int) -> None:
        self.users = 0
        self.interactions = 0
        self.item_count_N = np.zeros(num_items, np.int64)
        """Interactions of each item."""

    @classmethod
    def of(cls, frame: pl.DataFrame, num_items: int) -> "Tally":
        """The counts of one part."""
        tally = cls(num_items)
        tally.users = int(np.count_nonzero(np.bincount(frame["user"].to_numpy())))
        tally.interactions = frame.height
        tally.item_count_N += np.bincount(frame["item"].to_numpy(), minlength=num_items)
        return tally

    def add(self, other: "Tally") -> None:
        """Add the counts of other parts."""
        self.users += other.users
        self.interactions += other.interactions
        self.item_count_N += other.item_count_N

    def __reduce__(self) -> tuple[object, ...]:
        # A part has few of the items of a large catalog, and its counts may travel.
        items = np.flatnonzero(self.item_count_N)
        return _restored, (self.users, self.interactions, len(self.item_count_N), items, self.item_count_N[items])

    def stage(self, name: str) -> Stage:
        """The counts of all parts."""
        return Stage(name, self.users, int(np.count_nonzero(self.item_count_N)), self.interactions)


def _restored(
    users: int, interactions: int, num_items: int, items: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]
) -> Tally:
    tally = Tally(num_items)
    tally.users, tally.interactions = users, interactions
    tally.item_count_N[items] = counts
    return tally


class Partitioner:
    """Takes frames of events with raw ids; in memory up to `limit` events, then in files, one for each part.

    Args:
        scratch: an empty folder for the files; None keeps all events in memory.
    """

    def __init__(self, seed: int, scratch: Path | None = None, *, limit: int = EVENTS_IN_MEMORY) -> None:
        self._user_key = stream_key(seed, "users")
        self._scratch = scratch
        self._limit = limit
        # Categories that are this build's own, and forgotten after it. They last as long as a column that has them.
        self._items = pl.Categories.random("items")
        self._coded_items = pl.Series([], dtype=pl.Categorical(self._items))
        self._frames: list[pl.DataFrame] = []
        self._files: list[_PartFiles] = []

    def add(self, frame: pl.DataFrame) -> None:
        """Take a frame of user, item, time[, split][, row]."""
        self._frames.append(frame.with_columns(frame["item"].cast(self._coded_items.dtype).to_physical()))
        if self._scratch is not None and sum(frame.height for frame in self._frames) > self._limit:
            self._write(self._scratch)

    def finish(self) -> tuple[LocalParts[Events], pl.Series]:
        """All events in parts, and the sorted raw ids of all items."""
        raw = self._items.to_series()
        items = raw.sort()
        rank_N = np.empty(len(raw), np.uint32)
        rank_N[raw.arg_sort().to_numpy()] = np.arange(len(raw), dtype=np.uint32)
        if not self._files or self._scratch is None:
            return LocalParts([_encoded(*self._taken(), rank_N)]), items
        if self._frames:
            self._write(self._scratch)
        paths: list[Events | Path] = []
        for number, files in enumerate(progress(self._files, "partitioning")):
            frame, users = files.read()
            if frame.height:
                path = self._scratch / f"part-{number:02d}"
                write_part(path, _encoded(frame, users, rank_N))
                paths.append(path)
        return LocalParts(paths), items

    def _taken(self) -> tuple[pl.DataFrame, pl.DataFrame]:
        """The events in memory, whose users are now numbers of rows of the second frame: id and key."""
        frame, self._frames = pl.concat(self._frames), []
        coded = frame["user"].cast(pl.Categorical(pl.Categories.random("users")))
        code = coded.to_physical()
        number = int(str(code.max())) + 1 if len(code) else 0
        ids = pl.int_range(number, dtype=pl.UInt32, eager=True).cat.to(coded.dtype).cast(pl.String).rename("id")
        users = pl.DataFrame([ids, pl.Series("key", hash_strings(ids, self._user_key))])
        return frame.with_columns(code.alias("user")), users

    def _write(self, scratch: Path) -> None:
        """Move the events in memory to the files of their parts."""
        frame, users = self._taken()
        if not self._files:
            self._files = [_PartFiles(scratch, number) for number in range(1 << _PART_BITS)]
        part_U = (users["key"].to_numpy() >> np.uint64(64 - _PART_BITS)).astype(np.uint8)
        # Users of a part follow one another, so that their numbers in it are differences.
        order_U = np.argsort(part_U, kind="stable")
        first_P = np.searchsorted(part_U[order_U], np.arange(len(self._files) + 1))
        place_U = np.empty(len(order_U), np.uint32)
        place_U[order_U] = np.arange(len(order_U)) - first_P[part_U[order_U]]
        code_E = frame["user"].to_numpy()
        part_E = part_U[code_E]
        order_E = np.argsort(part_E, kind="stable")
        event_P = np.searchsorted(part_E[order_E], np.arange(len(self._files) + 1))
        frame = frame.with_columns(pl.Series("user", place_U[code_E]))[order_E]
        users = users[order_U]
        for part, files in enumerate(self._files):
            files.add(frame[event_P[part] : event_P[part + 1]], users[first_P[part] : first_P[part + 1]])


class _PartFiles:
    """Files of one part: events, and the users that their numbers stand for."""

    def __init__(self, scratch: Path, part: int) -> None:
        self._paths = [scratch / f"{kind}-{part:02d}.arrow" for kind in ("events", "users")]
        self._writers: list[pa.ipc.RecordBatchFileWriter] = []
        self._num_users = 0

    def add(self, frame: pl.DataFrame, users: pl.DataFrame) -> None:
        """Append events whose users are numbers of rows of `users`."""
        frame = frame.with_columns((pl.col("user") + self._num_users).cast(pl.UInt32))
        self._num_users += users.height
        tables = [table.to_arrow(compat_level=pl.CompatLevel.oldest()) for table in (frame, users)]
        if not self._writers:
            self._writers = [
                pa.ipc.new_file(path, table.schema) for path, table in zip(self._paths, tables, strict=True)
            ]
        for writer, table in zip(self._writers, tables, strict=True):
            writer.write_table(table)

    def read(self) -> tuple[pl.DataFrame, pl.DataFrame]:
        """All events and users; the files are removed."""
        found = []
        for writer, path in zip(self._writers, self._paths, strict=True):
            writer.close()
            with pa.OSFile(str(path)) as file, pa.ipc.open_file(file) as reader:
                found.append(pl.DataFrame(reader.read_all()))
            path.unlink()
        frame, users = found
        return frame, users


def encode(frame: pl.DataFrame, seed: int = 0) -> tuple[Events, pl.Series]:
    """The events of one frame of raw ids, and the sorted raw ids of its items."""
    collected = Partitioner(seed)
    collected.add(frame)
    parts, items = collected.finish()
    [events] = parts
    return events, items


def partitioned(
    frames: Iterable[pl.DataFrame], seed: int, scratch: Path | None = None, *, limit: int = EVENTS_IN_MEMORY
) -> tuple[LocalParts[Events], pl.Series]:
    """The events of all frames of raw ids in parts, and the sorted raw ids of all items (`Partitioner`)."""
    collected = Partitioner(seed, scratch, limit=limit)
    for frame in frames:
        collected.add(frame)
    return collected.finish()


def _encoded(frame: pl.DataFrame, entries: pl.DataFrame, rank_N: npt.NDArray[np.uint32]) -> Events:
    """Number the users by their hashes, and the items by their ids.

    Args:
        entries: id and key of the users that the frame refers to; a user may be in several rows.
        rank_N: place of each item's code in the order of ids.
    """
    users = entries.unique("id").sort("key", "id")
    codes = users.select("id", pl.int_range(pl.len(), dtype=pl.UInt32).alias("code"))
    code_X = entries.join(codes, on="id", how="left", maintain_order="left")["code"].to_numpy()
    frame = frame.with_columns(
        pl.Series("user", code_X[frame["user"].to_numpy()]), pl.Series("item", rank_N[frame["item"].to_numpy()])
    )
    return Events(frame, users["id"], users["key"].to_numpy())
