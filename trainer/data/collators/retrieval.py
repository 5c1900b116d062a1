"""Batches of packed prompts for retrieval, and the collator that builds them.

Letters: B users of this share, Y targets of all of them, W targets per user, C candidates, K negatives, P item prompts,
M items, L positions, G groups of rows that share a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from trainer.data.collators.base import BatchRows, ItemSequences
from trainer.data.collators.negatives import draw_negatives
from trainer.data.collators.sequences import SequenceCollator
from trainer.data.collators.targets import TargetKind, Targets, choose_targets
from trainer.data.prompts.packing import PackedPrompts
from trainer.data.prompts.prompt import Prompt
from trainer.data.prompts.writer import PromptWriter
from trainer.data.reading.counter_rng import IntArray
from trainer.data.reading.histories import Histories, Users


@dataclass(frozen=True)
class UserPrompts:
    """One packed prompt per user, and the users' item sequences if there is a teacher to read them."""

    prompts: PackedPrompts
    sequence: ItemSequences | None

    @property
    def useful_tokens(self) -> int:
        """See `HistoryBatch.useful_tokens`."""
        return self.prompts.useful_tokens


@dataclass(frozen=True)
class ItemPrompts:
    """One packed prompt per item."""

    prompts: PackedPrompts


@dataclass(frozen=True)
class RetrievalTraining:
    """User prompts, with Y read-outs in all, and item prompts of all distinct candidates, packed together.

    `candidate_YC[y, 0]` is target y; entries are indices of item prompts, from 0.
    """

    user_B: Tensor
    prompts: PackedPrompts
    sequence: ItemSequences | None
    """All events of the user before each target, for the teacher; None without one."""
    candidate_YC: Tensor
    slot_Y: Tensor
    """Index of target y in the flattened (B, W) table of each user's targets."""
    targets: int
    """W, the largest number of targets per user in the global batch."""


@dataclass(frozen=True)
class RetrievalCollator:
    """Builds packed prompts: items of the training sequence are targets, the items before each are its history."""

    writer: PromptWriter
    teacher: SequenceCollator | None
    num_items: int
    max_history: int
    candidates: int
    exclude_user: bool
    """True: negatives avoid all training items of the user. False (official code): only the shown history."""
    targets: TargetKind
    pack: Callable[[Sequence[Prompt]], PackedPrompts]
    seed: int

    def train(self, users: Users, share: slice, epoch: int) -> RetrievalTraining:
        """See `Collator.train`."""
        every = choose_targets(users.train, self.targets, max_history=self.max_history, address=(self.seed, epoch))
        mine, targets = users.take(share).train, every.take(share)
        shown = targets.shown(mine)
        forbidden = mine.take(targets.row_Y) if self.exclude_user else shown
        negative_YK = draw_negatives(
            # Addressed by target instead of by user, so that each target of a user gets its own negatives.
            replace(forbidden, user_U=targets.address_Y(mine)),
            self.candidates - 1,
            num_items=self.num_items,
            distinct=True,
            address=(self.seed, epoch),
        )
        item_YC = np.concatenate([targets.items(mine)[:, None], negative_YK], axis=1)
        # An item that several users need is encoded once.
        item_P, candidate_YC = np.unique(item_YC, return_inverse=True)
        prompts = [*self._user_prompts(shown), *(self.writer.item_prompt(int(item)) for item in item_P)]
        return RetrievalTraining(
            user_B=torch.from_numpy(mine.user_U),
            prompts=self.pack(prompts),
            sequence=teacher_sequences(self.teacher, mine, every, share),
            candidate_YC=torch.from_numpy(candidate_YC.reshape(item_YC.shape)),  # its shape depends on NumPy's version
            slot_Y=torch.from_numpy(targets.row_Y * every.columns + targets.column_Y),
            targets=every.columns,
        )

    def histories(self, histories: Histories) -> UserPrompts:
        """See `Collator.histories`. A history that extends the one in the row before adds only its new tokens."""
        return UserPrompts(
            prompts=self.pack(self._user_prompts(histories)),
            sequence=self.teacher.histories(histories) if self.teacher else None,
        )

    def items(self, item_M: IntArray) -> ItemPrompts:
        """See `Collator.items`."""
        return ItemPrompts(self.pack([self.writer.item_prompt(int(item)) for item in item_M]))

    def _user_prompts(self, histories: Histories) -> list[Prompt]:
        """Prompts with one read-out per row, in order; a user's rows that extend each other may share a prompt."""
        events = shown_events(histories, self.max_history)
        if self.writer.shows_user:  # each row injects a different user vector, so rows cannot share a prompt
            return [self.writer.user_prompt(*shown) for shown in events]
        user_U = histories.user_U.tolist()
        first_G = [
            row
            for row in range(len(events))
            if row == 0 or user_U[row] != user_U[row - 1] or not _extends(events[row], events[row - 1])
        ]
        length_U = np.array([len(item_L) for item_L, _ in events], np.int64)
        return [
            prompt
            for first, end in zip(first_G, [*first_G, len(events)][1:], strict=True)
            for prompt in self.writer.user_prompts(*events[end - 1], length_U[first:end])
        ]


def _extends(longer: tuple[IntArray, IntArray], shorter: tuple[IntArray, IntArray]) -> bool:
    """Whether the events of `longer` start with all events of `shorter` and go beyond them; False if that is empty."""
    length = len(shorter[0])
    return 0 < length < len(longer[0]) and all(
        np.array_equal(column[:length], other) for column, other in zip(longer, shorter, strict=True)
    )


def shown_events(histories: Histories, max_history: int) -> list[tuple[IntArray, IntArray]]:
    """Items and times of each user's `max_history` latest events, one pair of arrays per user."""
    shown = histories.last(max_history)
    bounds = zip(shown.offset_U1[:-1], shown.offset_U1[1:], strict=True)
    return [(shown.item_E[a:b], shown.time_E[a:b]) for a, b in bounds]


def teacher_sequences(
    teacher: SequenceCollator | None, mine: Histories, every: Targets, share: slice
) -> ItemSequences | None:
    """Item sequences before each target of this share, for the teacher; None without a teacher.

    Args:
        mine: training sequences of the share's users.
        every: targets of the global batch.
    """
    if teacher is None:
        return None
    before = every.take(share).before(mine)
    # Padded to the longest of the *global* batch: the teacher's dropout masks then do not depend on the share.
    length = teacher.padded_length(int(every.end_Y.max()))
    first = int((every.row_Y < share.start).sum())
    return ItemSequences(torch.from_numpy(before.padded(length)), BatchRows(first, len(before), len(every)))
