"""How a global batch is split among ranks and micro-batches; torch-free."""

from __future__ import annotations

from trainer.config import TrainConfig


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


def micro_batch_count(train: TrainConfig, ranks: int) -> int:
    """Forward passes per rank and optimizer step: those of the rank with the largest share."""
    largest = max(share_sizes(train.batch_size, ranks))
    return -(-largest // (train.micro_batch_size or largest))
