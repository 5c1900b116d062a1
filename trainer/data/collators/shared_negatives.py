"""Next-item training with one set of negatives per user, shared by all positions.

Hundreds of negatives per position would cost more to draw and to look up than they are worth; GRU4Rec's official code
shares one set across a whole mini-batch. One set per user avoids the user's own items and does not couple users.

Letters: B users of this share, L positions, K negatives per user, M items.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from trainer.data.collators.base import ON_HOST, ItemIds, ItemSequences
from trainer.data.collators.negatives import draw_negatives
from trainer.data.collators.sequences import SequenceCollator
from trainer.data.reading.counter_rng import IntArray
from trainer.data.reading.histories import Histories, Users


@dataclass(frozen=True)
class SharedNegativeTraining:
    """Next-item targets at every position (0 marks padding), and one set of negatives per user."""

    user_B: Tensor = field(metadata=ON_HOST)
    input: ItemSequences
    target_BL: Tensor
    negative_BK: Tensor
    position_M: Tensor
    """See `positions_with_loss`, of `target_BL`."""


@dataclass(frozen=True)
class SharedNegativeCollator:
    """Builds batches of item ids with `negatives` distinct items per user, none of them in the training sequence."""

    sequences: SequenceCollator
    negatives: int

    @property
    def max_history(self) -> int:
        """See `Collator.max_history`."""
        return self.sequences.max_history

    def train(self, users: Users, share: slice, epoch: int) -> SharedNegativeTraining:
        """See `Collator.train`."""
        batch = self.sequences.train(users, share, epoch)
        negative_BK = draw_negatives(
            users.take(share).train,
            self.negatives,
            num_items=self.sequences.num_items,
            distinct=True,
            address=(self.sequences.seed, epoch),
        )
        return SharedNegativeTraining(
            batch.user_B, batch.input, batch.target_BL, torch.from_numpy(negative_BK), batch.position_M
        )

    def histories(self, histories: Histories) -> ItemSequences:
        """See `Collator.histories`."""
        return self.sequences.histories(histories)

    def items(self, item_M: IntArray) -> ItemIds:
        """See `Collator.items`."""
        return self.sequences.items(item_M)
