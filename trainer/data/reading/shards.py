"""Users read from WebDataset tars, in sample order."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np

from shards.manifest import DatasetError, Manifest, ShardEntry, check_unchanged
from shards.remote.linked import Prefetch, held_shard
from trainer.data.reading.counter_rng import IntArray
from trainer.data.reading.histories import Users
from trainer.data.reading.records import UNREADABLE, read_records
from trainer.data.reading.sample_order import epoch_windows


def read_shards(path: Path, manifest: Manifest, shards: Sequence[int]) -> Users:
    """Read all users of these shards, shard by shard.

    Raises:
        DatasetError: a tar cannot be fetched, is damaged, its users are not those in the manifest, or it was replaced.
            Reading stops at the end of some truncated tars without an error, so the users are counted.
    """
    parts = []
    for shard in shards:
        entry = manifest.shards[shard]
        with held_shard(path, entry) as file:
            parts.append(_read_shard(file, entry, manifest))
    return Users.concatenate(parts)


def _read_shard(file: Path, entry: ShardEntry, manifest: Manifest) -> Users:
    try:
        blocks = list(read_records(file))
    except UNREADABLE as error:
        raise DatasetError(f"{file} cannot be read ({error}): copy the dataset again or rebuild it") from error
    found = sum(len(block) for block in blocks)
    if found != entry.users:
        raise DatasetError(
            f"{file} holds {found} users, but the manifest says {entry.users}: copy the dataset again or rebuild it"
        )
    users = Users.concatenate(blocks)
    if not _matches_manifest(users, entry, manifest.num_items):
        raise DatasetError(
            f"{file} does not hold the users and items that the manifest says: copy the dataset again or rebuild it"
        )
    check_unchanged(file.parent, entry)
    after = manifest.successive_after
    return users if after is None else users.with_targets_after(after)


def read_in_order(path: Path, manifest: Manifest, group: int = 16) -> Iterator[Users]:
    """Read all users by ascending user index, `group` shards at a time."""
    with closing(Prefetch(path)) as prefetch:
        for start in range(0, len(manifest.shards), group):
            prefetch.start(manifest.shards[start : start + 2 * group])
            yield read_shards(path, manifest, range(start, min(start + group, len(manifest.shards))))


def read_users(path: Path, manifest: Manifest, user_U: IntArray) -> Users:
    """Read some users, ascending by user index, from the shards that hold them.

    Raises:
        DatasetError: a damaged shard.
    """
    first = np.array([shard.first_user for shard in manifest.shards])
    held_by_U = np.searchsorted(first, user_U, side="right") - 1
    users = read_shards(path, manifest, np.unique(held_by_U).tolist())
    return users.take(np.flatnonzero(np.isin(users.train.user_U, user_U)))


def read_validated(path: Path, manifest: Manifest) -> Users:
    """Read the first shard that has users to validate on; the last, if none has."""
    for shard in range(len(manifest.shards)):
        users = read_shards(path, manifest, [shard])
        if users.valid_item_U.any():
            break
    return users


def epoch_batches(
    path: Path,
    manifest: Manifest,
    *,
    batch_size: int,
    shuffle_shards: int,
    seed: int,
    epoch: int,
    first_step: int = 0,
) -> Iterator[Users]:
    """Yield the epoch's global batches of users with a training sequence, from `first_step` on; windows before it are
    not read."""
    skip = first_step * batch_size
    pending: list[Users] = []
    windows = epoch_windows([shard.train_users for shard in manifest.shards], shuffle_shards, seed, epoch)
    windows = [window for window in windows if len(window.order) and window.first + len(window.order) > skip]
    with closing(Prefetch(path)) as prefetch:
        for window, following in itertools.zip_longest(windows, windows[1:]):
            needed = (*window.shards, *(following.shards if following else ()))
            prefetch.start([manifest.shards[shard] for shard in needed])
            users = read_shards(path, manifest, window.shards).trained()
            position = max(skip - window.first, 0)
            while position < len(window.order):
                missing = batch_size - sum(len(part) for part in pending)
                pending.append(users.take(window.order[position : position + missing]))
                position += missing
                if sum(len(part) for part in pending) == batch_size:
                    yield Users.concatenate(pending)
                    pending = []
    if pending:
        yield Users.concatenate(pending)


def _matches_manifest(users: Users, entry: ShardEntry, num_items: int) -> bool:
    """Whether the users are those of the shard and all items exist: a cheap check that neither tar nor Arrow makes."""
    lists = [part for part in (users.train, users.valid_context, users.test_context) if part is not None]
    held_out = np.concatenate([users.valid_item_U, users.test_item_U])  # 0: the user has none
    return (
        np.array_equal(users.train.user_U, np.arange(entry.first_user, entry.first_user + len(users)))
        and np.count_nonzero(users.train.length_U) == entry.train_users
        and all(len(part.item_E) == len(part.time_E) == part.offset_U1[-1] for part in lists)
        and all(bool(np.all((part.item_E >= 1) & (part.item_E <= num_items))) for part in lists)
        and bool(np.all((held_out >= 0) & (held_out <= num_items)))
    )
