"""Splits a global batch into the shares of ranks and into micro-batches; torch-free."""

from __future__ import annotations

from trainer.config import TrainConfig


def num_steps(num_users: int, batch_size: int) -> int:
    """Optimizer steps per epoch; the last batch may be smaller."""
    return -(-num_users // batch_size)


def share(rows: int, rank: int, world_size: int) -> slice:
    """Rows of a global batch that a rank runs: contiguous, disjoint, together all rows, sizes differ by at most one."""
    return slice(rows * rank // world_size, rows * (rank + 1) // world_size)


def share_sizes(rows: int, world_size: int) -> list[int]:
    """Number of rows of each rank's share."""
    shares = [share(rows, rank, world_size) for rank in range(world_size)]
    return [part.stop - part.start for part in shares]


def micro_batch_count(train: TrainConfig, ranks: int) -> int:
    """Forward passes per rank and optimizer step: as many as the largest share needs."""
    largest = max(share_sizes(train.batch_size, ranks))
    return -(-largest // (train.micro_batch_size or largest))
