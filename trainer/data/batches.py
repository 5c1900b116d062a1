"""What models read: typed batches, and the collators that make them from users.

A training batch is one rank's share of a global batch; `rows` says which. Everything random in it (negatives) is
addressed by user, so the share does not change what is drawn.

Letters: B users of this share, L positions, K negatives a position, C candidates, P item prompts, M items.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from trainer.data.negatives import draw_negatives
from trainer.data.packing import PackedPrompts, pack, pack_rows
from trainer.data.prompts import Prompt, PromptWriter
from trainer.data.randomness import IntArray
from trainer.data.users import Histories, Users

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


@dataclass(frozen=True)
class UserPrompts:
    """One packed user prompt each, and the same users' item sequences for the teacher."""

    prompts: PackedPrompts
    sequence: ItemSequences


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
    sequence: ItemSequences
    candidate_BC: Tensor


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
            input=ItemSequences(torch.from_numpy(mine.without_last().padded(length)), _rows(users, share)),
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


@dataclass(frozen=True)
class PromptCollator:
    """Batches of packed prompts: the last training item is the target, what precedes it the history."""

    writer: PromptWriter
    teacher: SequenceCollator
    num_items: int
    max_history: int
    candidates: int
    exclude_user: bool
    """Negatives avoid all training items of the user; False (official code): only the shown history."""
    row_tokens: int | None
    """Length of padded rows; None packs into a stream."""
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
        # The longest of the *global* batch, for the masks of the teacher's dropout.
        length = self.teacher.padded_length(int(users.train.length_U.max()) - 1)
        prompts = [*self._user_prompts(history), *(self.writer.item_prompt(int(item)) for item in item_P)]
        return RetrievalTraining(
            user_B=torch.from_numpy(mine.user_U),
            prompts=self._pack(prompts),
            sequence=ItemSequences(torch.from_numpy(history.padded(length)), _rows(users, share)),
            candidate_BC=torch.from_numpy(candidate_BC.reshape(item_BC.shape)),
        )

    def histories(self, histories: Histories) -> UserPrompts:
        """See `Collator.histories`."""
        return UserPrompts(self._pack(self._user_prompts(histories)), self.teacher.histories(histories))

    def items(self, item_M: IntArray) -> ItemPrompts:
        """See `Collator.items`."""
        return ItemPrompts(self._pack([self.writer.item_prompt(int(item)) for item in item_M]))

    def _pack(self, prompts: list[Prompt]) -> PackedPrompts:
        return pack(prompts) if self.row_tokens is None else pack_rows(prompts, self.row_tokens)

    def _user_prompts(self, histories: Histories) -> list[Prompt]:
        shown = histories.last(self.max_history)
        bounds = list(zip(shown.offset_U1[:-1], shown.offset_U1[1:], strict=True))
        return [self.writer.user_prompt(shown.item_E[a:b], shown.time_E[a:b]) for a, b in bounds]


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


def _rows(users: Users, share: slice) -> Rows:
    return Rows(share.start, share.stop - share.start, len(users))
