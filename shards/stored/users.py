"""Reads whole histories of a built dataset, a shard at a time.

Letters: U users, E events of all users joined end to end.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from shards.manifest import DatasetError, Manifest, check_sizes
from shards.remote.linked import held_shard
from shards.splitmix import draw, mix
from shards.stored.records import UNREADABLE, read_batches

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class StoredUsers:
    """Whole histories of users: training, validation and test, in time order."""

    user_U: Ints
    offset_U1: Ints
    """Events of row u are `item_E[offset_U1[u]:offset_U1[u + 1]]`."""
    item_E: Ints
    time_E: Ints
    """Milliseconds since 1970 UTC."""
    train_U: Ints
    """How many of a user's events, the first ones, are its training sequence."""
    has_test_U: npt.NDArray[np.bool_]
    """Whether the last event is a test target."""

    @property
    def row_E(self) -> Ints:
        """Row of the user of each event."""
        return np.repeat(np.arange(len(self.user_U)), np.diff(self.offset_U1))

    @property
    def position_E(self) -> Ints:
        """Place of each event in its user's history, from 0."""
        return np.arange(len(self.item_E)) - self.offset_U1[:-1][self.row_E]

    def shuffled_items(self, seed: int, *, keep_last: bool = False) -> Ints:
        """`item_E` with each user's items in random order, which depends on (seed, user) alone.

        Args:
            keep_last: leave the test targets where they are, and shuffle the histories before them.
        """
        row_E, position_E = self.row_E, self.position_E
        user_key_U = mix(self.user_U.astype(np.uint64) + np.uint64(seed))
        key_E = draw(user_key_U[row_E], position_E.astype(np.uint64))
        if keep_last:
            key_E[self.offset_U1[1:][self.has_test_U] - 1] = np.iinfo(np.uint64).max
        shuffled: Ints = self.item_E[np.lexsort((key_E, row_E))]
        return shuffled


def read_stored(directory: Path, manifest: Manifest) -> Iterator[StoredUsers]:
    """Yield the users of each record.

    Raises:
        DatasetError: a file is missing, damaged, or holds items that are not in the catalog.
    """
    check_sizes(directory, manifest)
    for shard in manifest.shards:
        with held_shard(Path(directory), shard) as path:
            try:
                for batch in read_batches(path):
                    users = _stored(batch)
                    if users.item_E.size and not 1 <= users.item_E.min() <= users.item_E.max() <= manifest.num_items:
                        raise ValueError(f"it holds items that are not between 1 and {manifest.num_items}")
                    yield users
            except UNREADABLE as error:
                raise DatasetError(f"{path} cannot be read ({error}): copy the dataset again or rebuild it") from None


def _stored(batch: pa.RecordBatch) -> StoredUsers:
    def flat(name: str) -> tuple[Ints, Ints]:
        column = batch.column(name)
        return column.offsets.to_numpy().astype(np.int64), column.values.to_numpy().astype(np.int64)

    def single(name: str) -> tuple[Ints, Ints]:
        value_U = batch.column(name).to_numpy().astype(np.int64)
        item_U = batch.column(f"{name.split('_')[0]}_item").to_numpy()
        return np.concatenate([[0], np.cumsum(item_U > 0)]), value_U[item_U > 0]

    rows, items, times = [], [], []
    present = set(batch.schema.names)
    for item, time, read in (
        ("items", "times", flat),
        ("valid_context_items", "valid_context_times", flat),
        ("valid_item", "valid_time", single),
        ("test_context_items", "test_context_times", flat),
        ("test_item", "test_time", single),
    ):
        if item in present:
            offsets, values = read(item)
            rows.append(np.repeat(np.arange(len(batch)), np.diff(offsets)))
            items.append(values)
            times.append(read(time)[1])
    # Parts of a user are in time order, so that a stable sort by user joins them.
    row_E = np.concatenate(rows)
    order = np.argsort(row_E, kind="stable")
    return StoredUsers(
        user_U=batch.column("user").to_numpy().astype(np.int64),
        offset_U1=np.concatenate([[0], np.cumsum(np.bincount(row_E, minlength=len(batch)))]).astype(np.int64),
        item_E=np.concatenate(items)[order],
        time_E=np.concatenate(times)[order],
        train_U=np.diff(flat("items")[0]),
        has_test_U=batch.column("test_item").to_numpy() > 0,
    )
