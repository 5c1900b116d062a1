"""Batches of packed prompts for retrieval, and the collator that makes them.

Letters: B users of this share, C candidates, P item prompts, M items, L positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trainer.data.batches import ItemSequences, SequenceCollator, rows_of
from trainer.data.negatives import draw_negatives
from trainer.data.packing import PackedPrompts
from trainer.data.prompts import Prompt, PromptWriter
from trainer.data.randomness import IntArray
from trainer.data.users import Histories, Users


@dataclass(frozen=True)
class UserPrompts:
    """One packed user prompt each, and the same users' item sequences where there is a teacher to read them."""

    prompts: PackedPrompts
    sequence: ItemSequences | None


@dataclass(frozen=True)
class ItemPrompts:
    """One packed item prompt each."""

    prompts: PackedPrompts


@dataclass(frozen=True)
class RetrievalTraining:
    """User prompts (the first B) and prompts of all distinct candidates, packed together.

    `candidate_BC[b, 0]` is the target; entries count item prompts from 0.
    """

    user_B: Tensor
    prompts: PackedPrompts
    sequence: ItemSequences | None
    candidate_BC: Tensor


@dataclass(frozen=True)
class RetrievalCollator:
    """Batches of packed prompts: the last training item is the target, what precedes it the history."""

    writer: PromptWriter
    teacher: SequenceCollator | None
    num_items: int
    max_history: int
    candidates: int
    exclude_user: bool
    """Negatives avoid all training items of the user; False (official code): only the shown history."""
    pack: Callable[[Sequence[Prompt]], PackedPrompts]
    seed: int

    def train(self, users: Users, share: slice, epoch: int) -> RetrievalTraining:
        """See `Collator.train`."""
        mine = users.take(share).train
        history = mine.without_last()
        forbidden = mine if self.exclude_user else history.last(self.max_history)
        negative_BK = draw_negatives(
            forbidden,
            self.candidates - 1,
            num_items=self.num_items,
            distinct=True,
            address=(self.seed, epoch),
        )
        item_BC = np.concatenate([mine.last_item_U()[:, None], negative_BK], axis=1)
        # An item that several users need is encoded once.
        item_P, candidate_BC = np.unique(item_BC, return_inverse=True)
        prompts = [*self._user_prompts(history), *(self.writer.item_prompt(int(item)) for item in item_P)]
        return RetrievalTraining(
            user_B=torch.from_numpy(mine.user_U),
            prompts=self.pack(prompts),
            sequence=teacher_sequences(self.teacher, history, users, share),
            candidate_BC=torch.from_numpy(candidate_BC.reshape(item_BC.shape)),
        )

    def histories(self, histories: Histories) -> UserPrompts:
        """See `Collator.histories`."""
        return UserPrompts(
            prompts=self.pack(self._user_prompts(histories)),
            sequence=self.teacher.histories(histories) if self.teacher else None,
        )

    def items(self, item_M: IntArray) -> ItemPrompts:
        """See `Collator.items`."""
        return ItemPrompts(self.pack([self.writer.item_prompt(int(item)) for item in item_M]))

    def _user_prompts(self, histories: Histories) -> list[Prompt]:
        return [self.writer.user_prompt(*events) for events in shown_events(histories, self.max_history)]


def shown_events(histories: Histories, max_history: int) -> list[tuple[IntArray, IntArray]]:
    """Items and times of each user's `max_history` latest events."""
    shown = histories.last(max_history)
    bounds = zip(shown.offset_U1[:-1], shown.offset_U1[1:], strict=True)
    return [(shown.item_E[a:b], shown.time_E[a:b]) for a, b in bounds]


def teacher_sequences(
    teacher: SequenceCollator | None, history: Histories, users: Users, share: slice
) -> ItemSequences | None:
    """What the teacher reads of the histories of this share; None without a teacher."""
    if teacher is None:
        return None
    # The longest of the *global* batch, for the masks of the teacher's dropout.
    length = teacher.padded_length(int(users.train.length_U.max()) - 1)
    return ItemSequences(torch.from_numpy(history.padded(length)), rows_of(users, share))
