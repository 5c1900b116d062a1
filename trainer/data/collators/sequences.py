"""Batches of item-id sequences, and the collator that builds them.

Letters: B users of this share, L positions, K negatives per position, X draws per user (L * K), M items.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from trainer.data.collators.base import (
    ON_HOST,
    BatchRows,
    ItemIds,
    ItemSequences,
    batch_rows,
    positions_with_loss,
)
from trainer.data.collators.negatives import draw_negatives
from trainer.data.reading.counter_rng import IntArray
from trainer.data.reading.histories import Histories, Users


@dataclass(frozen=True)
class SequenceTraining:
    """Next-item targets and negatives at every position; target 0 marks padding."""

    user_B: Tensor = field(metadata=ON_HOST)
    input: ItemSequences
    target_BL: Tensor
    negative_BLK: Tensor
    position_M: Tensor
    """See `positions_with_loss`, of `target_BL`."""


@dataclass(frozen=True)
class SequenceCollator:
    """Builds batches of item ids: inputs are items 1 to n-1 of the training sequence, targets items 2 to n."""

    num_items: int
    max_history: int
    negatives: int
    """Negatives per position; 0 for losses over the full catalog."""
    fixed_length: bool
    """Always pad to `max_history` instead of to the longest sequence of the global batch."""
    seed: int

    def train(self, users: Users, share: slice, epoch: int) -> SequenceTraining:
        """See `Collator.train`."""
        mine = users.take(share).train
        # Padded to the longest of the *global* batch, so that all ranks have the same shape and the same dropout masks.
        length = self.padded_length(int(users.train.length_U.max()) - 1)
        input_BL = mine.without_last().padded(length)
        target_BL = np.where(input_BL > 0, mine.padded(length), 0)
        draws = length * self.negatives
        # Reversed, so that draws count from the last position: a user's negatives do not depend on the padded length.
        negative_BX = draw_negatives(mine, draws, num_items=self.num_items, distinct=False, address=(self.seed, epoch))[
            :, ::-1
        ]
        # Contiguous, because torch.from_numpy takes no negative strides.
        negative_BLK = np.ascontiguousarray(negative_BX).reshape(len(mine), length, self.negatives)
        return SequenceTraining(
            user_B=torch.from_numpy(mine.user_U),
            input=ItemSequences(torch.from_numpy(input_BL), batch_rows(users, share)),
            target_BL=torch.from_numpy(target_BL),
            negative_BLK=torch.from_numpy(negative_BLK),
            position_M=positions_with_loss(target_BL),
        )

    def histories(self, histories: Histories) -> ItemSequences:
        """See `Collator.histories`."""
        longest = int(histories.length_U.max()) if len(histories) else 1
        item_BL = histories.padded(self.padded_length(longest))
        return ItemSequences(torch.from_numpy(item_BL), BatchRows(0, len(histories), len(histories)))

    def items(self, item_M: IntArray) -> ItemIds:
        """See `Collator.items`."""
        return ItemIds(torch.from_numpy(item_M))

    def padded_length(self, longest: int) -> int:
        """Number of positions of a batch whose longest history has `longest` items."""
        return self.max_history if self.fixed_length else max(1, min(longest, self.max_history))
