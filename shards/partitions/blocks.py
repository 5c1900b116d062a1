"""Cuts events into blocks. In a block they are sorted by the parts of their users: the seeded hashes of a part's users
are above those of the part before, which is the order of users in a dataset."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from shards.hashing import hash_strings, stream_key
from shards.partitions.events import Events

PART_BITS = 6
"""64 parts: of 100 million events, each has 1.6 million."""

Bounds = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Piece:
    """Events of a block that belong to one part.

    `frame` is that of `Events`, but for its users, rows of `users` (id and key), and its items, codes of the `Cutter`.
    """

    frame: pl.DataFrame
    users: pl.DataFrame


@dataclass(frozen=True)
class Block:
    """Events of all parts: those of part p are rows `events_P[p]` to `events_P[p+1]`, its users `users_P[p]` to ..."""

    frame: pl.DataFrame
    users: pl.DataFrame
    events_P: Bounds
    users_P: Bounds

    def piece(self, part: int) -> Piece:
        """The events of a part."""
        events, users = (slice(bounds_P[part], bounds_P[part + 1]) for bounds_P in (self.events_P, self.users_P))
        return Piece(self.frame[events], self.users[users])


class Cutter:
    """Takes frames of events with raw ids, and cuts what it holds into blocks. Items have the same codes in all of
    them."""

    def __init__(self, seed: int) -> None:
        self._user_key = stream_key(seed, "users")
        # Categories that are this cutter's own, and forgotten with it. They last as long as a column that has them.
        self._items = pl.Categories.random("items")
        self._coded_items = pl.Series([], dtype=pl.Categorical(self._items))
        self._frames: list[pl.DataFrame] = []

    @property
    def held(self) -> int:
        """Number of events since the last block."""
        return sum(frame.height for frame in self._frames)

    def add(self, frame: pl.DataFrame) -> None:
        """Take a frame of user, item, time[, split][, row]."""
        self._frames.append(frame.with_columns(frame["item"].cast(self._coded_items.dtype).to_physical()))

    def items(self) -> pl.Series:
        """Raw ids of all items so far, by code."""
        return self._items.to_series().alias("item")

    def cut(self, bits: int = PART_BITS) -> Block:
        """The events that were held, cut into 2^`bits` parts."""
        frame, users = self._taken()
        parts = np.arange((1 << bits) + 1)
        part_U = np.zeros(users.height, np.int64)
        if bits:
            part_U = (users["key"].to_numpy() >> np.uint64(64 - bits)).astype(np.int64)
        # Users of a part follow one another, so that their numbers in it are differences.
        order_U = np.argsort(part_U, kind="stable")
        users_P = np.searchsorted(part_U[order_U], parts)
        place_U = np.empty(len(order_U), np.uint32)
        place_U[order_U] = np.arange(len(order_U)) - users_P[part_U[order_U]]
        code_E = frame["user"].to_numpy()
        part_E = part_U[code_E]
        order_E = np.argsort(part_E.astype(np.uint8), kind="stable")
        events_P = np.searchsorted(part_E[order_E], parts)
        frame = frame.with_columns(pl.Series("user", place_U[code_E]))[order_E]
        return Block(frame, users[order_U], events_P, users_P)

    def _taken(self) -> tuple[pl.DataFrame, pl.DataFrame]:
        """The events that are held, whose users are now numbers of rows of the second frame: id and key."""
        frame, self._frames = pl.concat(self._frames), []
        coded = frame["user"].cast(pl.Categorical(pl.Categories.random("users")))
        code = coded.to_physical()
        number = int(str(code.max())) + 1 if len(code) else 0
        ids = pl.int_range(number, dtype=pl.UInt32, eager=True).cat.to(coded.dtype).cast(pl.String).rename("id")
        users = pl.DataFrame([ids, pl.Series("key", hash_strings(ids, self._user_key))])
        return frame.with_columns(code.alias("user")), users


def write_block(folder: Path, block: Block) -> None:
    """Write a block to a new folder."""
    folder.mkdir()
    for name, frame in (("events", block.frame), ("users", block.users)):
        table = frame.to_arrow(compat_level=pl.CompatLevel.oldest())
        with pa.ipc.new_file(folder / f"{name}.arrow", table.schema) as file:
            file.write_table(table)
    np.save(folder / "bounds.npy", np.stack([block.events_P, block.users_P]))


def read_piece(folder: Path, part: int) -> Piece:
    """Read the events of a part from a block's folder."""
    events_P, users_P = np.load(folder / "bounds.npy")
    return Piece(
        *(
            _rows(folder / f"{name}.arrow", *bounds_P[part : part + 2])
            for name, bounds_P in (("events", events_P), ("users", users_P))
        )
    )


def _rows(path: Path, start: int, stop: int) -> pl.DataFrame:
    with pa.memory_map(str(path)) as file, pa.ipc.open_file(file) as reader:
        return pl.DataFrame(reader.read_all().slice(start, stop - start)).rechunk()


def joined(pieces: Iterable[tuple[Piece, npt.NDArray[np.uint32]]]) -> Events:
    """The events of pieces of the same part, with numbers of users in the order of their hashes.

    Args:
        pieces: with the number of each of their item codes.
    """
    frames, entries, users = [], [], 0
    for piece, number_N in pieces:
        item_E = number_N[piece.frame["item"].to_numpy()]
        user = (pl.col("user") + users).cast(pl.UInt32)
        frames.append(piece.frame.with_columns(user, pl.Series("item", item_E)))
        entries.append(piece.users)
        users += piece.users.height
    return _encoded(pl.concat(frames), pl.concat(entries))


def encode(frame: pl.DataFrame, seed: int = 0) -> tuple[Events, pl.Series]:
    """The events of one frame of raw ids, and the sorted raw ids of its items."""
    cutter = Cutter(seed)
    cutter.add(frame)
    items, number_N = ranked(cutter.items())
    return joined([(cutter.cut(bits=0).piece(0), number_N)]), items


def places(ids: pl.Series, among: pl.Series) -> npt.NDArray[np.uint32]:
    """The place of each id among others, which have all of them."""
    numbered = pl.DataFrame({"id": among}).with_row_index("place")
    found = pl.DataFrame({"id": ids}).join(numbered, on="id", how="left", maintain_order="left")
    place_N: npt.NDArray[np.uint32] = found["place"].to_numpy()
    return place_N


def ranked(raw: pl.Series) -> tuple[pl.Series, npt.NDArray[np.uint32]]:
    """The sorted ids, and the place of each id among them."""
    number_N = np.empty(len(raw), np.uint32)
    number_N[raw.arg_sort().to_numpy()] = np.arange(len(raw), dtype=np.uint32)
    return raw.sort(), number_N


def _encoded(frame: pl.DataFrame, entries: pl.DataFrame) -> Events:
    """Number the users by their hashes.

    Args:
        entries: id and key of the users that the frame refers to; a user may be in several rows.
    """
    users = entries.unique("id").sort("key", "id")
    codes = users.select("id", pl.int_range(pl.len(), dtype=pl.UInt32).alias("code"))
    code_X = entries.join(codes, on="id", how="left", maintain_order="left")["code"].to_numpy()
    frame = frame.with_columns(pl.Series("user", code_X[frame["user"].to_numpy()]))
    return Events(frame, users["id"], users["key"].to_numpy())
