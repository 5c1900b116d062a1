"""Sequences with masked items, for models that are trained to fill them in (Devlin et al. 2019; BERT4Rec §3.6).

What is masked depends on (seed, epoch, user) alone.

Letters: B users of this share, U users of the global batch, L positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trainer.data.collators.base import BatchRows, ItemIds, ItemSequences
from trainer.data.reading.counter_rng import IntArray, hash64, uniform_integers
from trainer.data.reading.histories import Histories, Users

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class MaskedTraining:
    """Sequences in which some items are replaced by the mask id; the target is the item there and 0 elsewhere."""

    user_B: Tensor
    input: ItemSequences
    target_BL: Tensor


@dataclass(frozen=True)
class MaskingCollator:
    """Batches of masked sequences; the mask has the id after the last item's."""

    num_items: int
    max_length: int
    """Positions of a sequence, masks included."""
    mask_share: float
    last_item_share: float
    """Share of sequences that are cut after a random item, which alone is masked."""
    seed: int

    @property
    def max_history(self) -> int:
        """One item less than there are positions: the last position is the mask to be filled in."""
        return self.max_length - 1

    def train(self, users: Users, share: slice, epoch: int) -> MaskedTraining:
        """See `Collator.train`."""
        all_cut, last_only_U = self._cut(users.train, epoch)
        mine = all_cut.take(share)
        # The longest of the *global* batch: every rank then has the same shape, and dropout the same masks.
        item_BL = mine.padded(min(int(all_cut.length_U.max()), self.max_length))
        masked_BL = self._masked(mine.user_U, item_BL > 0, last_only_U[share], epoch)
        return MaskedTraining(
            user_B=torch.from_numpy(mine.user_U),
            input=ItemSequences(
                torch.from_numpy(np.where(masked_BL, self.num_items + 1, item_BL)),
                BatchRows(share.start, share.stop - share.start, len(users)),
            ),
            target_BL=torch.from_numpy(np.where(masked_BL, item_BL, 0)),
        )

    def histories(self, histories: Histories) -> ItemSequences:
        """Histories with a mask after the latest item."""
        longest = int(histories.length_U.max()) if len(histories) else 1
        item_BL = histories.padded(min(longest, self.max_history))
        mask_B1 = np.full((len(histories), 1), self.num_items + 1)
        rows = BatchRows(0, len(histories), len(histories))
        return ItemSequences(torch.from_numpy(np.concatenate([item_BL, mask_B1], axis=1)), rows)

    def items(self, item_M: IntArray) -> ItemIds:
        """See `Collator.items`."""
        return ItemIds(torch.from_numpy(item_M))

    def _cut(self, train: Histories, epoch: int) -> tuple[Histories, BoolArray]:
        """Sequences as they are shown, and in which of them only the last item is masked.

        Those end at a random item: cut at the same item in each epoch, they would be learned by heart.
        """
        last_only_U = uniform_integers(2**53, self.seed, epoch, train.user_U, 0) < self.last_item_share * 2**53
        # The first item has nothing before it that could tell it.
        cut_U = 2 + hash64(self.seed, epoch, train.user_U, 1) % np.maximum(train.length_U - 1, 1).astype(np.uint64)
        length_U = np.where(last_only_U, np.minimum(cut_U.astype(np.int64), train.length_U), train.length_U)
        return train.select(np.arange(len(train)), train.offset_U1[:-1], length_U), last_only_U

    def _masked(self, user_B: IntArray, real_BL: BoolArray, last_only_B: BoolArray, epoch: int) -> BoolArray:
        """(B, L) which places are masked: in each row at least one real place."""
        # Places count from the end, so that the padded length does not move a user's masks.
        place_L = np.arange(real_BL.shape[1])[::-1]
        draw_BL = hash64(self.seed, epoch, user_B[:, None], 2, place_L).astype(np.float64)
        order_BL = np.where(real_BL, draw_BL, np.inf).argsort(axis=1, kind="stable")
        rank_BL = order_BL.argsort(axis=1, kind="stable")
        count_B = np.maximum(np.rint(self.mask_share * real_BL.sum(axis=1)), 1)
        masked_BL: BoolArray = np.where(last_only_B[:, None], place_L == 0, rank_BL < count_B[:, None])
        return masked_BL
