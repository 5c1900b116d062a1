"""Sample order: which rank sees which user when, as a pure function of (seed, epoch, step, rank, world size).

An epoch is a permutation of all users with a training sequence, cut into global batches; each rank runs its share of
every global batch. So the samples are the same at any number of ranks, all ranks run the same number of steps, and
resuming is an offset.

Shards are permuted first, then users within windows of a few shards, so that memory does not grow with the dataset.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trainer.data.reading.counter_rng import IntArray, permutation


@dataclass(frozen=True)
class Window:
    """Shards that are read and shuffled together."""

    shards: tuple[int, ...]
    first: int
    """Index of the window's first user in the epoch."""
    order: IntArray
    """Permutation of the window's users, concatenated in the order of `shards`."""


def epoch_windows(shard_users: Sequence[int], shuffle_shards: int, seed: int, epoch: int) -> list[Window]:
    """The windows of an epoch, in order.

    Args:
        shard_users: `shard_users[s]` is the number of these users in shard s.
        shuffle_shards: shards per window; the last window may have fewer.
    """
    shard_order = permutation(len(shard_users), seed, epoch, 0)
    windows = []
    first = 0
    for start in range(0, len(shard_order), shuffle_shards):
        shards = tuple(int(s) for s in shard_order[start : start + shuffle_shards])
        users = sum(shard_users[s] for s in shards)
        windows.append(Window(shards, first, permutation(users, seed, epoch, 1, start)))
        first += users
    return windows
