"""Batches of systems that read items as text (A-LLMRec's stage 1, CTRL's alignment), and their collators.

Letters: B users of this share, P = 2B items (each user's target, then its negative), N items.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from trainer.data.collators.base import ON_HOST, BatchRows, ItemIds, ItemSequences
from trainer.data.collators.negatives import draw_negatives
from trainer.data.collators.sequences import SequenceCollator
from trainer.data.encoder_texts import HistoryWriter, PaddedTexts, TokenLists
from trainer.data.reading.counter_rng import IntArray, integers_below
from trainer.data.reading.histories import Histories, Users


@dataclass(frozen=True)
class ItemPairs:
    """Each user's history, and its target and negative as ids and as texts."""

    user_B: Tensor = field(metadata=ON_HOST)
    sequence: ItemSequences
    item_P: Tensor
    texts: PaddedTexts


@dataclass(frozen=True)
class ItemPairCollator:
    """Builds batches of A-LLMRec's stage 1: the last training item is the target, all items before it the history."""

    teacher: SequenceCollator
    texts: TokenLists
    """Texts of the catalog; text n belongs to item n + 1."""
    num_items: int
    seed: int

    @property
    def max_history(self) -> int:
        """See `Collator.max_history`."""
        return self.teacher.max_history

    def train(self, users: Users, share: slice, epoch: int) -> ItemPairs:
        """See `Collator.train`."""
        # Drawn for the *global* batch: its longest text sets the shape, and with it the dropout masks, of all ranks.
        negative_U1 = draw_negatives(
            users.train, 1, num_items=self.num_items, distinct=True, address=(self.seed, epoch)
        )
        item_U2 = np.stack([users.train.last_item_U(), negative_U1[:, 0]], axis=1)
        longest_text = int(self.texts.length_N[item_U2 - 1].max())
        longest = self.teacher.padded_length(int(users.train.length_U.max()) - 1)
        item_P = item_U2[share].flatten()
        rows = BatchRows(2 * share.start, len(item_P), item_U2.size)
        history = users.take(share).train.without_last()
        return ItemPairs(
            user_B=torch.from_numpy(history.user_U),
            sequence=ItemSequences(
                torch.from_numpy(history.padded(longest)), BatchRows(share.start, len(history), len(users))
            ),
            item_P=torch.from_numpy(item_P),
            texts=self.texts.padded(item_P - 1, rows, longest_text),
        )

    def histories(self, histories: Histories) -> ItemSequences:
        """See `Collator.histories`."""
        return self.teacher.histories(histories)

    def items(self, item_M: IntArray) -> ItemIds:
        """See `Collator.items`."""
        return self.teacher.items(item_M)


@dataclass(frozen=True)
class HistoryTexts:
    """Histories both as item ids and as sentences."""

    user_B: Tensor = field(metadata=ON_HOST)
    sequence: ItemSequences
    texts: PaddedTexts


@dataclass(frozen=True)
class HistoryTextCollator:
    """Builds batches of CTRL's alignment: a random prefix of each user's training sequence, redrawn every epoch."""

    sequences: SequenceCollator
    writer: HistoryWriter
    seed: int

    @property
    def max_history(self) -> int:
        """See `Collator.max_history`."""
        return self.sequences.max_history

    def train(self, users: Users, share: slice, epoch: int) -> HistoryTexts:
        """See `Collator.train`."""
        train = users.train
        length_U = 1 + integers_below(train.length_U, self.seed, epoch, train.user_U)
        part = train.select(np.arange(len(train)), train.offset_U1[:-1], length_U)
        # Written for the *global* batch: its longest text sets the shape, and with it the dropout masks, of all ranks.
        texts = self.writer.histories(part)
        mine = part.take(share)
        rows = BatchRows(share.start, len(mine), len(users))
        longest = self.sequences.padded_length(int(length_U.max()))
        return HistoryTexts(
            user_B=torch.from_numpy(mine.user_U),
            sequence=ItemSequences(torch.from_numpy(mine.padded(longest)), rows),
            texts=texts.padded(np.arange(len(users))[share], rows, int(texts.length_N.max())),
        )

    def histories(self, histories: Histories) -> ItemSequences:
        """See `Collator.histories`."""
        return self.sequences.histories(histories)

    def items(self, item_M: IntArray) -> PaddedTexts:
        """See `Collator.items`; each text is the sentence of a one-item history."""
        texts = self.writer.items(item_M)
        return texts.padded(np.arange(len(item_M)), BatchRows(0, len(item_M), len(item_M)))
