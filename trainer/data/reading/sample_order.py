"""Order as arithmetic: who sees which user when, as a pure function of (seed, epoch, step, rank, world size).

An epoch is a permutation of all users. It is cut into global batches, and each rank takes its share of every global
batch. Hence the same samples at any number of ranks, the same number of steps on each, and resuming is an offset.

Users are permuted within windows of a few shards, so that memory does not grow with the dataset; the shards
themselves are permuted first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

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


def num_steps(num_users: int, batch_size: int) -> int:
    """Steps an epoch; the last batch may be smaller."""
    return -(-num_users // batch_size)


def share(rows: int, rank: int, world_size: int) -> slice:
    """The rows of a global batch that a rank runs: contiguous, sizes differ by at most one, together all of them."""
    return slice(rows * rank // world_size, rows * (rank + 1) // world_size)


def share_sizes(rows: int, world_size: int) -> list[int]:
    """How many rows each rank runs."""
    shares = [share(rows, rank, world_size) for rank in range(world_size)]
    return [part.stop - part.start for part in shares]


def validations_done(step: int, steps_per_epoch: int, every_epochs: float) -> int:
    """How many validations fall in the first `step` steps if there is one each `every_epochs` epochs.

    Exact arithmetic: with 0.1, the tenth validation is at the last step of the epoch, never one later.
    """
    interval = Fraction(str(every_epochs)) * steps_per_epoch
    return int(step / interval) if interval >= 1 else step
