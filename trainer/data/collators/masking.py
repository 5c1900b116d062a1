"""Masked item sequences, for models trained to predict the masked items (Devlin et al. 2019; BERT4Rec §3.6).

The masks depend on (seed, epoch, user) alone.

Letters: B users of this share, U users of the global batch, L positions.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trainer.data.collators.base import ON_HOST, BatchRows, ItemIds, ItemSequences, positions_with_loss
from trainer.data.reading.counter_rng import IntArray, hash64, uniform_integers
from trainer.data.reading.histories import Histories, Users

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class MaskedTraining:
    """Sequences with some items replaced by the mask id; the target is the original item there, and 0 elsewhere."""

    user_B: Tensor = field(metadata=ON_HOST)
    input: ItemSequences
    target_BL: Tensor
    position_M: Tensor
    """See `positions_with_loss`, of `target_BL`."""


@dataclass(frozen=True)
class MaskingCollator:
    """Builds batches of masked sequences; the mask id is `num_items` + 1."""

    num_items: int
    max_length: int
    """Positions per sequence, masks included."""
    mask_share: float
    """Fraction of a sequence's items that is masked, at least one item."""
    last_item_share: float
    """Fraction of sequences that are cut after a random item, which is then the only masked one."""
    seed: int

    @property
    def max_history(self) -> int:
        """`max_length` - 1: when ranking, the last position holds the mask to predict."""
        return self.max_length - 1

    def train(self, users: Users, share: slice, epoch: int) -> MaskedTraining:
        """See `Collator.train`."""
        all_cut, last_only_U = self._cut(users.train, epoch)
        mine = all_cut.take(share)
        # Padded to the longest of the *global* batch, so that all ranks have the same shape and the same dropout masks.
        item_BL = mine.padded(min(int(all_cut.length_U.max()), self.max_length))
        masked_BL = self._masked(mine.user_U, item_BL > 0, last_only_U[share], epoch)
        target_BL = np.where(masked_BL, item_BL, 0)
        return MaskedTraining(
            user_B=torch.from_numpy(mine.user_U),
            input=ItemSequences(
                torch.from_numpy(np.where(masked_BL, self.num_items + 1, item_BL)),
                BatchRows(share.start, share.stop - share.start, len(users)),
            ),
            target_BL=torch.from_numpy(target_BL),
            position_M=positions_with_loss(target_BL),
        )

    def histories(self, histories: Histories) -> ItemSequences:
        """See `Collator.histories`; a mask follows the latest item."""
        longest = int(histories.length_U.max()) if len(histories) else 1
        item_BL = histories.padded(min(longest, self.max_history))
        mask_B1 = np.full((len(histories), 1), self.num_items + 1)
        rows = BatchRows(0, len(histories), len(histories))
        return ItemSequences(torch.from_numpy(np.concatenate([item_BL, mask_B1], axis=1)), rows)

    def items(self, item_M: IntArray) -> ItemIds:
        """See `Collator.items`."""
        return ItemIds(torch.from_numpy(item_M))

    def _cut(self, train: Histories, epoch: int) -> tuple[Histories, BoolArray]:
        """The epoch's training sequences, and which of them have only their last item masked.

        The latter are cut after a random item: cut after the same item in every epoch, they would be memorised.
        """
        # 53 bits, which a float64 represents exactly.
        last_only_U = uniform_integers(2**53, self.seed, epoch, train.user_U, 0) < self.last_item_share * 2**53
        # Never cut after the first item: nothing precedes it to predict it from.
        cut_U = 2 + hash64(self.seed, epoch, train.user_U, 1) % np.maximum(train.length_U - 1, 1).astype(np.uint64)
        length_U = np.where(last_only_U, np.minimum(cut_U.astype(np.int64), train.length_U), train.length_U)
        return train.select(np.arange(len(train)), train.offset_U1[:-1], length_U), last_only_U

    def _masked(self, user_B: IntArray, real_BL: BoolArray, last_only_B: BoolArray, epoch: int) -> BoolArray:
        """(B, L) True at masked positions; each row has at least one, and it is never padding."""
        # Positions count from the end, so that a user's masks do not depend on the padded length.
        position_L = np.arange(real_BL.shape[1])[::-1]
        draw_BL = hash64(self.seed, epoch, user_B[:, None], 2, position_L).astype(np.float64)
        # Padding sorts last, so the lowest ranks are real items.
        order_BL = np.where(real_BL, draw_BL, np.inf).argsort(axis=1, kind="stable")
        rank_BL = order_BL.argsort(axis=1, kind="stable")
        count_B = np.maximum(np.rint(self.mask_share * real_BL.sum(axis=1)), 1)
        masked_BL: BoolArray = np.where(last_only_B[:, None], position_L == 0, rank_BL < count_B[:, None])
        return masked_BL
