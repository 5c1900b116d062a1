"""Users read from WebDataset tars, in sample order."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import webdataset as wds

from shards.manifest import DatasetError, Manifest, check_unchanged
from trainer.data.reading.counter_rng import IntArray
from trainer.data.reading.histories import Histories, Users
from trainer.data.reading.sample_order import epoch_windows


def read_shards(path: Path, manifest: Manifest, shards: Sequence[int]) -> Users:
    """Read all users of these shards, shard by shard.

    Raises:
        DatasetError: a tar is damaged, its users are not those in the manifest, or it was replaced. WebDataset stops at
            the end of some truncated tars without an error, so the users are counted.
    """
    parts = []
    for shard in shards:
        entry = manifest.shards[shard]
        # A plain pipeline: wds.WebDataset would split shards over ranks and workers, which `sample_order` decides here.
        records = wds.DataPipeline(
            wds.SimpleShardList([str(path / entry.name)]),
            wds.tarfile_to_samples(handler=wds.reraise_exception),
        )
        try:
            blocks = [_decode(record["arrow"]) for record in records]
        except (tarfile.TarError, OSError, ValueError, KeyError, EOFError, pa.ArrowException) as error:
            raise DatasetError(
                f"{path / entry.name} cannot be read ({error}): copy the dataset again or rebuild it"
            ) from error
        found = sum(len(block) for block in blocks)
        if found != entry.users:
            raise DatasetError(
                f"{path / entry.name} holds {found} users, but the manifest says {entry.users}: "
                "copy the dataset again or rebuild it"
            )
        users = Users.concatenate(blocks)
        if not _matches_manifest(users, entry.first_user, manifest.num_items):
            raise DatasetError(
                f"{path / entry.name} does not hold the users and items that the manifest says: "
                "copy the dataset again or rebuild it"
            )
        check_unchanged(path, entry)
        parts.append(users)
    return Users.concatenate(parts)


def read_in_order(path: Path, manifest: Manifest, group: int = 16) -> Iterator[Users]:
    """Read all users by ascending user index, `group` shards at a time."""
    for start in range(0, len(manifest.shards), group):
        yield read_shards(path, manifest, range(start, min(start + group, len(manifest.shards))))


def read_user(path: Path, manifest: Manifest, user: int) -> Histories:
    """Read the full history of one user, held-out items included."""
    index = next(i for i, shard in enumerate(manifest.shards) if user < shard.first_user + shard.users)
    users = read_shards(path, manifest, [index])
    return users.take(np.flatnonzero(users.train.user_U == user)).whole()


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
    """Yield the epoch's global batches from `first_step` on; windows before it are not read."""
    skip = first_step * batch_size
    pending: list[Users] = []
    for window in epoch_windows([shard.users for shard in manifest.shards], shuffle_shards, seed, epoch):
        stop = window.first + len(window.order)
        if stop <= skip:
            continue
        users = read_shards(path, manifest, window.shards)
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


def _matches_manifest(users: Users, first_user: int, num_items: int) -> bool:
    """Whether the users are those of the shard and all items exist: a cheap check that neither tar nor Arrow makes."""
    item_E = users.train.item_E
    return (
        np.array_equal(users.train.user_U, np.arange(first_user, first_user + len(users)))
        and len(item_E) == len(users.train.time_E) == users.train.offset_U1[-1]
        and bool(np.all((item_E >= 1) & (item_E <= num_items)))
    )


def _decode(payload: bytes) -> Users:
    """Users of one Arrow IPC stream."""
    batch = pa.ipc.open_stream(io.BytesIO(payload)).read_all().combine_chunks()
    batch.validate(full=True)  # or list offsets out of range would go unnoticed

    def column(name: str) -> IntArray:
        values: IntArray = batch.column(name).to_numpy().astype(np.int64)
        return values

    items = batch.column("items").combine_chunks()
    times = batch.column("times").combine_chunks()
    train = Histories(
        column("user"),
        items.offsets.to_numpy().astype(np.int64),
        items.values.to_numpy().astype(np.int64),
        times.values.to_numpy().astype(np.int64),
    )
    return Users(train, column("valid_item"), column("valid_time"), column("test_item"), column("test_time"))
