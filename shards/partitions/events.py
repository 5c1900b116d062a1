"""Events with numbers in place of raw ids."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl

from shards.manifest import Stage
from shards.splitmix import UInt64Array


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
