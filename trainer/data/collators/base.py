"""What models read: typed batches, and the collators that make them from users. Prompts: see `prompt_batches.py`.

A training batch is one rank's share of a global batch; `rows` says which. Everything random in it (negatives) is
addressed by user, so the share does not change what is drawn.

Letters: B users of this share, L positions, K negatives a position, M items.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from trainer.data.collators.negatives import draw_negatives
from trainer.data.reading.counter_rng import IntArray
from trainer.data.reading.histories import Histories, Users

BatchT = TypeVar("BatchT")


@dataclass(frozen=True)
class Rows:
    """Which rows of the global batch these are."""

    start: int
    count: int
    total: int


@dataclass(frozen=True)
class ItemSequences:
    """Histories of item ids, padded with 0 on the left."""

    item_BL: Tensor
    rows: Rows


@dataclass(frozen=True)
class ItemIds:
    """Items to be encoded by a model that knows them by number."""

    item_M: Tensor


@dataclass(frozen=True)
class SequenceTraining:
    """Next-item targets and negatives at every position; target 0 is padding."""

    user_B: Tensor
    input: ItemSequences
    target_BL: Tensor
    negative_BLK: Tensor


TrainBatchT = TypeVar("TrainBatchT", covariant=True)
HistoryBatchT = TypeVar("HistoryBatchT", covariant=True)
ItemBatchT = TypeVar("ItemBatchT", covariant=True)


class Collator(Protocol[TrainBatchT, HistoryBatchT, ItemBatchT]):
    """Makes one system's batches; picklable, so that loader processes can hold it."""

    @property
    def max_history(self) -> int:
        """Items of a history that the system shows or reads, the latest ones."""

    def train(self, users: Users, share: slice, epoch: int) -> TrainBatchT:
        """The rows `share` of the global batch `users`."""

    def histories(self, histories: Histories) -> HistoryBatchT:
        """Users whose vectors are wanted."""

    def items(self, item_M: IntArray) -> ItemBatchT:
        """Items whose vectors are wanted."""


@dataclass(frozen=True)
class SequenceCollator:
    """Batches of item ids: inputs are positions 1 to n-1 of the training sequence, targets 2 to n."""

    num_items: int
    max_history: int
    negatives: int
    """A position; 0 for losses over the whole catalog."""
    fixed_length: bool
    """Always pad to `max_history` instead of the longest of the global batch."""
    seed: int

    def train(self, users: Users, share: slice, epoch: int) -> SequenceTraining:
        """See `Collator.train`."""
        mine = users.take(share).train
        # The longest of the *global* batch: every rank then has the same shape, and dropout the same masks.
        length = self.padded_length(int(users.train.length_U.max()) - 1)
        target_BL = mine.padded(length)
        draws = length * self.negatives
        # Drawn for right-aligned places, so that the padded length does not move a user's draws.
        negative_BD = draw_negatives(mine, draws, num_items=self.num_items, distinct=False, address=(self.seed, epoch))[
            :, ::-1
        ]
        negative_BLK = np.ascontiguousarray(negative_BD).reshape(len(mine), length, self.negatives)
        return SequenceTraining(
            user_B=torch.from_numpy(mine.user_U),
            input=ItemSequences(torch.from_numpy(mine.without_last().padded(length)), rows_of(users, share)),
            target_BL=torch.from_numpy(np.where(mine.without_last().padded(length) > 0, target_BL, 0)),
            negative_BLK=torch.from_numpy(negative_BLK),
        )

    def histories(self, histories: Histories) -> ItemSequences:
        """See `Collator.histories`."""
        longest = int(histories.length_U.max()) if len(histories) else 1
        item_BL = histories.padded(self.padded_length(longest))
        return ItemSequences(torch.from_numpy(item_BL), Rows(0, len(histories), len(histories)))

    def items(self, item_M: IntArray) -> ItemIds:
        """See `Collator.items`."""
        return ItemIds(torch.from_numpy(item_M))

    def padded_length(self, longest: int) -> int:
        """How many positions a batch has whose longest history has `longest` items."""
        return self.max_history if self.fixed_length else max(1, min(longest, self.max_history))


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


def rows_of(users: Users, share: slice) -> Rows:
    """Which rows of the global batch `users` the share is."""
    return Rows(share.start, share.stop - share.start, len(users))
