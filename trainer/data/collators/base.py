"""What models read: typed batches, and the collators that make them from users. Prompts: see `prompt_batches.py`.

A training batch is one rank's share of a global batch; `rows` says which. Everything random in it (negatives) is
addressed by user, so the share does not change what is drawn.

Letters: B users of this share, L positions, K negatives a position, M items.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from trainer.data.reading.counter_rng import IntArray
from trainer.data.reading.histories import Histories, Users

BatchT = TypeVar("BatchT")


@dataclass(frozen=True)
class BatchRows:
    """Which rows of the global batch these are."""

    start: int
    count: int
    total: int


@dataclass(frozen=True)
class ItemSequences:
    """Histories of item ids, padded with 0 on the left."""

    item_BL: Tensor
    rows: BatchRows

    @property
    def useful_tokens(self) -> int:
        """No LLM reads them."""
        return 0


@dataclass(frozen=True)
class ItemIds:
    """Items to be encoded by a model that knows them by number."""

    item_M: Tensor


class HistoryBatch(Protocol):
    """A batch of histories."""

    @property
    def useful_tokens(self) -> int:
        """LLM tokens of its prompts, had each been run alone; 0 for a system without an LLM."""


TrainBatchT = TypeVar("TrainBatchT", covariant=True)
HistoryBatchT = TypeVar("HistoryBatchT", bound=HistoryBatch, covariant=True)
ItemBatchT = TypeVar("ItemBatchT", covariant=True)


class TrainingCollator(Protocol[TrainBatchT]):
    """Makes training batches; picklable, so that loader processes can hold it."""

    @property
    def max_history(self) -> int:
        """Items of a history that the system shows or reads, the latest ones."""

    def train(self, users: Users, share: slice, epoch: int) -> TrainBatchT:
        """The rows `share` of the global batch `users`."""


class VectorCollator(Protocol[HistoryBatchT, ItemBatchT]):
    """Makes the batches that user and item vectors are computed from."""

    @property
    def max_history(self) -> int:
        """Items of a history that the system shows or reads, the latest ones."""

    def histories(self, histories: Histories) -> HistoryBatchT:
        """Users whose vectors are wanted."""

    def items(self, item_M: IntArray) -> ItemBatchT:
        """Items whose vectors are wanted."""


class Collator(
    TrainingCollator[TrainBatchT],
    VectorCollator[HistoryBatchT, ItemBatchT],
    Protocol[TrainBatchT, HistoryBatchT, ItemBatchT],
):
    """All batches of a system that scores by vectors."""


def to_device(batch: BatchT, device: torch.device) -> BatchT:
    """The batch with every tensor in it, at any depth, on `device`."""
    moved: BatchT = _map_tensors(batch, device)
    return moved


def _map_tensors(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, tuple):
        return tuple(_map_tensors(part, device) for part in value)
    if is_dataclass(value) and not isinstance(value, type):
        return type(value)(**{field.name: _map_tensors(getattr(value, field.name), device) for field in fields(value)})
    return value


def batch_rows(users: Users, share: slice) -> BatchRows:
    """Which rows of the global batch `users` the share is."""
    return BatchRows(share.start, share.stop - share.start, len(users))
