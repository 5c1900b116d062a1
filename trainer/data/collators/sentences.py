"""Batches of RECFORMER, and the collators that build them.

Letters: B users of this share, K sampled items, M items, U users of the global batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from trainer.data.collators.base import ON_HOST, BatchRows, TrainBatchT
from trainer.data.collators.negatives import draw_negatives
from trainer.data.item_sentences import MaskedSentences, Sentences, SentenceWriter, longest
from trainer.data.reading.counter_rng import IntArray, integers_below
from trainer.data.reading.histories import Histories, Users

BatchT = TypeVar("BatchT")


@dataclass(frozen=True)
class ItemSentences:
    """Items as ids and as sentences."""

    item_M: Tensor
    sentences: Sentences


@dataclass(frozen=True)
class SentencePairs:
    """Histories and the items that follow them, both clean and with masked words."""

    user_B: Tensor = field(metadata=ON_HOST)
    histories: Sentences
    items: Sentences
    masked_histories: MaskedSentences
    masked_items: MaskedSentences


@dataclass(frozen=True)
class SentenceTraining:
    """Histories, the items that follow them, and sampled negatives (None: the full catalog is scored)."""

    user_B: Tensor = field(metadata=ON_HOST)
    histories: Sentences
    target_B: Tensor
    negative_BK: Tensor | None


class SentenceBatches(Protocol[TrainBatchT]):
    """Builds the training batches of one phase of RECFORMER: pre-training or fine-tuning."""

    def train(self, users: Users, share: slice, epoch: int) -> TrainBatchT:
        """See `Collator.train`."""


@dataclass(frozen=True)
class SentenceCollator(Generic[BatchT]):
    """Builds all batches of RECFORMER; `training` sets the phase."""

    writer: SentenceWriter
    training: SentenceBatches[BatchT]

    @property
    def max_history(self) -> int:
        """See `Collator.max_history`."""
        return self.writer.max_items

    def train(self, users: Users, share: slice, epoch: int) -> BatchT:
        """See `Collator.train`."""
        return self.training.train(users, share, epoch)

    def histories(self, histories: Histories) -> Sentences:
        """See `Collator.histories`."""
        texts = self.writer.histories(histories)
        return self.writer.pad(texts, BatchRows(0, len(texts), len(texts)), longest(texts))

    def items(self, item_M: IntArray) -> ItemSentences:
        """See `Collator.items`."""
        texts = self.writer.items(item_M)
        sentences = self.writer.pad(texts, BatchRows(0, len(texts), len(texts)), longest(texts))
        return ItemSentences(torch.from_numpy(item_M), sentences)


@dataclass(frozen=True)
class PretrainBatches:
    """Pre-training: the target is drawn from the second half of the training sequence, again in every epoch."""

    writer: SentenceWriter
    mask_share: float
    """Probability that a word is masked."""
    seed: int

    def train(self, users: Users, share: slice, epoch: int) -> SentencePairs:
        """See `Collator.train`."""
        history, target_U = cut_at_random(users.train, np.maximum(users.train.length_U // 2, 1), self.seed, epoch)
        rows = BatchRows(share.start, share.stop - share.start, len(users))
        user_B = users.train.user_U[share]
        batch = []
        # Written for the *global* batch: its longest text sets the shape, and with it the dropout masks, of all ranks.
        for side, texts in enumerate((self.writer.histories(history), self.writer.items(target_U))):
            clean = self.writer.pad(texts[share], rows, longest(texts))
            masked = self.writer.mask_words(texts[share], clean, self.mask_share, user_B, self.seed, epoch, side)
            batch.append((clean, masked))
        (histories, masked_histories), (items, masked_items) = batch
        return SentencePairs(torch.from_numpy(user_B), histories, items, masked_histories, masked_items)


@dataclass(frozen=True)
class FinetuneBatches:
    """Fine-tuning: the target is any training item but the first, redrawn every epoch.

    The official code can also draw the first item, which leaves an empty history.
    """

    writer: SentenceWriter
    num_items: int
    negatives: int | None
    """Negatives per user; None: the full catalog is scored."""
    seed: int

    def train(self, users: Users, share: slice, epoch: int) -> SentenceTraining:
        """See `Collator.train`."""
        history, target_U = cut_at_random(users.train, np.ones(len(users), np.int64), self.seed, epoch)
        texts = self.writer.histories(history)  # of the *global* batch: its longest text sets the shape of all ranks
        negative_BK = None
        if self.negatives is not None:
            mine, address = users.train.take(share), (self.seed, epoch)
            drawn_BK = draw_negatives(mine, self.negatives, num_items=self.num_items, distinct=True, address=address)
            negative_BK = torch.from_numpy(drawn_BK)
        return SentenceTraining(
            user_B=torch.from_numpy(users.train.user_U[share]),
            histories=self.writer.pad(
                texts[share], BatchRows(share.start, share.stop - share.start, len(users)), longest(texts)
            ),
            target_B=torch.from_numpy(target_U[share]),
            negative_BK=negative_BK,
        )


def cut_at_random(train: Histories, first_U: IntArray, seed: int, epoch: int) -> tuple[Histories, IntArray]:
    """Each user's sequence before a random index of at least `first_U` (from 0), and the item at that index, (U,)."""
    index_U = first_U + integers_below(train.length_U - first_U, seed, epoch, train.user_U)
    history = train.select(np.arange(len(train)), train.offset_U1[:-1], index_U)
    return history, train.item_E[train.offset_U1[:-1] + index_U]
