"""Order as arithmetic: who sees which user when, as a pure function of (seed, epoch, step, rank, world size).

An epoch is a permutation of all users. It is cut into global batches, and each rank takes its share of every global
batch. Hence the same samples at any number of ranks, the same number of steps on each, and resuming is an offset.

Users are permuted within windows of a few shards, so that memory does not grow with the dataset; the shards
themselves are permuted first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trainer.data.reading.counter_rng import IntArray, permutation


@dataclass(frozen=True)
class Window:
    """Shards that are read and shuffled together, and the order of their users once concatenated."""

    shards: tuple[int, ...]
    first: int
    """Place of the window's first user in the epoch."""
    order: IntArray


def epoch_windows(shard_users: Sequence[int], shuffle_shards: int, seed: int, epoch: int) -> list[Window]:
    """The epoch's windows in order; `shard_users[s]` is the number of users in shard s."""
    shard_order = permutation(len(shard_users), seed, epoch, 0)
    windows = []
    first = 0
    for start in range(0, len(shard_order), shuffle_shards):
        shards = tuple(int(s) for s in shard_order[start : start + shuffle_shards])
        users = sum(shard_users[s] for s in shards)
        windows.append(Window(shards, first, permutation(users, seed, epoch, 1, start)))
        first += users
    return windows
