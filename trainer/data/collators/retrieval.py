"""Batches of packed prompts for retrieval, and the collator that builds them.

Letters: B users of this share, Y targets of all of them, W targets per user, C candidates, K negatives, P item prompts,
M items, X items that a user of the batch encodes, N items and padding, L positions, G groups of rows that share a
prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from trainer.data.collators.base import ON_HOST, BatchRows, ItemSequences, batch_rows
from trainer.data.collators.negatives import OFFICIAL_HISTORY, draw_negatives
from trainer.data.collators.sequences import SequenceCollator
from trainer.data.collators.targets import Floats, TargetKind, Targets, choose_targets
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
class BatchItems:
    """The distinct items of a global batch, against which all of its targets are scored (`train_candidates=batch`).

    Each rank has the same list of M items and encodes a part of it: as many items per user of its share.
    """

    per_user: int
    """X: user b of the global batch encodes items b X to (b + 1) X, as far as there are any."""
    item_P: Tensor
    """Ids of the items that this share encodes."""
    log_q_BX: Tensor
    """Log-probability that the item gets into a batch; 0 without an item."""
    excluded_BM: Tensor
    """1 for the items of the user's training sequence, its targets included, else 0; uint8."""


@dataclass(frozen=True)
class RetrievalTraining:
    """User prompts, with Y read-outs in all, and item prompts of distinct items, packed together.

    `candidate_YC[y, 0]` is target y. Entries are indices of item prompts, from 0; with `batch_items`, which leaves the
    target alone (C = 1), they are indices of the global batch's items.
    """

    user_B: Tensor = field(metadata=ON_HOST)
    prompts: PackedPrompts
    sequence: ItemSequences | None
    """All events of the user before each target, for the teacher; None without one."""
    candidate_YC: Tensor
    slot_Y: Tensor
    """Index of target y in the flattened (B, W) table of each user's targets."""
    targets: int
    """W, the largest number of targets per user in the global batch."""
    all_targets: int
    """Number of targets of the global batch, of all ranks."""
    batch_items: BatchItems | None = None
    """None: each target is scored against its own candidates."""


@dataclass(frozen=True)
class RetrievalCollator:
    """Builds packed prompts: items of the training sequence are targets, the items before each are its history."""

    writer: PromptWriter
    teacher: SequenceCollator | None
    num_items: int
    shown_history: int
    """Items per history in a prompt; the latest ones have titles, the `max_vector_items` before them do not."""
    candidates: int
    """C, the target included."""
    exclude_user: bool
    """True: negatives avoid all training items of the user. False (official code): only those before the target."""
    targets: TargetKind
    pack: Callable[[Sequence[Prompt]], PackedPrompts]
    seed: int
    max_vector_items: int = 0
    target_share_N: Floats | None = None
    """How often each item is a target, as a share of all targets; scores each target against all items of the global
    batch. None: against its own candidates."""

    @property
    def max_history(self) -> int:
        """See `Collator.max_history`; if prompts inject the teacher's user vector, also what the teacher reads."""
        read = self.teacher.max_history if self.teacher and self.writer.injects_user else 0
        return max(self.shown_history, read)

    def train(self, users: Users, share: slice, epoch: int) -> RetrievalTraining:
        """See `Collator.train`."""
        every = choose_targets(
            users.train,
            self.targets,
            max_history=self.shown_history - self.max_vector_items,
            max_vector_items=self.max_vector_items,
            address=(self.seed, epoch),
        )
        mine, targets = users.take(share).train, every.take(share)
        user_prompts = self._user_prompts(targets.shown(mine), targets.vectors_Y)
        if self.target_share_N is None:
            item_P, candidate_YC = self._own_candidates(mine, targets, epoch)
            batch_items = None
        else:
            item_M = self._items_of_batch(users.train, every, epoch)
            candidate_YC = np.searchsorted(item_M, targets.items(mine))[:, None]
            batch_items, item_P = self._batch_items(item_M, mine, every, batch_rows(users, share))
        prompts = [*user_prompts, *(self.writer.item_prompt(int(item)) for item in item_P)]
        return RetrievalTraining(
            user_B=torch.from_numpy(mine.user_U),
            prompts=self.pack(prompts),
            sequence=teacher_sequences(self.teacher, mine, every, share),
            candidate_YC=torch.from_numpy(candidate_YC),
            slot_Y=torch.from_numpy(targets.row_Y * every.columns + targets.column_Y),
            targets=every.columns,
            all_targets=len(every),
            batch_items=batch_items,
        )

    def _own_candidates(self, mine: Histories, targets: Targets, epoch: int) -> tuple[IntArray, IntArray]:
        """Distinct items (P,), and the indices (Y, C) there of each target and its negatives."""
        negative_YK = self._negatives(mine, targets, self.candidates - 1, epoch)
        item_YC = np.concatenate([targets.items(mine)[:, None], negative_YK], axis=1)
        # An item that several users need is encoded once.
        item_P, candidate_YC = np.unique(item_YC, return_inverse=True)
        return item_P, candidate_YC.reshape(item_YC.shape)  # its shape depends on NumPy's version

    def _items_of_batch(self, sequences: Histories, every: Targets, epoch: int) -> IntArray:
        """(M,) distinct targets and negatives of the global batch, ascending."""
        negative_YK = self._negatives(sequences, every, self.candidates - 1, epoch)
        return np.unique(np.concatenate([every.items(sequences), negative_YK.flatten()]))

    def _batch_items(
        self, item_M: IntArray, mine: Histories, every: Targets, rows: BatchRows
    ) -> tuple[BatchItems, IntArray]:
        """This share's part of the items of the global batch, and the items (P,) that it encodes."""
        assert self.target_share_N is not None
        per_user = -(-len(item_M) // rows.total)
        end = rows.start + rows.count
        item_P = item_M[rows.start * per_user : end * per_user]
        # Expected number of times that an item is drawn, once per target and K times as its negative; exp(-expected) is
        # then the probability that it is not in the batch at all.
        expected_P = len(every) * (self.target_share_N[item_P] + (self.candidates - 1) / self.num_items)
        log_q_BX = np.zeros(rows.count * per_user, np.float32)
        log_q_BX[: len(item_P)] = np.log(-np.expm1(-expected_P))
        excluded_BM = np.zeros((rows.count, len(item_M)), np.uint8)
        row_E = np.repeat(np.arange(len(mine)), mine.length_U)
        at_E = np.minimum(np.searchsorted(item_M, mine.item_E), len(item_M) - 1)
        found_E = item_M[at_E] == mine.item_E
        excluded_BM[row_E[found_E], at_E[found_E]] = 1
        items = BatchItems(
            per_user,
            torch.from_numpy(item_P),
            torch.from_numpy(log_q_BX.reshape(rows.count, per_user)),
            torch.from_numpy(excluded_BM),
        )
        return items, item_P

    def _negatives(self, sequences: Histories, targets: Targets, draws: int, epoch: int) -> IntArray:
        """(Y, draws) negatives of each target."""
        if self.exclude_user:
            forbidden = sequences.take(targets.row_Y)
        else:
            forbidden = targets.before(sequences, max(OFFICIAL_HISTORY, self.shown_history))
        return draw_negatives(
            # Addressed by target instead of by user, so that each target of a user gets its own negatives.
            replace(forbidden, user_U=targets.address_Y(sequences)),
            draws,
            num_items=self.num_items,
            distinct=True,
            address=(self.seed, epoch),
        )

    def histories(self, histories: Histories) -> UserPrompts:
        """See `Collator.histories`. A history that extends the one in the row before adds only its new tokens."""
        shown = histories.last(self.shown_history)
        return UserPrompts(
            prompts=self.pack(self._user_prompts(shown, vectors_of(shown, self.shown_history - self.max_vector_items))),
            sequence=self.teacher.histories(histories) if self.teacher else None,
        )

    def items(self, item_M: IntArray) -> ItemPrompts:
        """See `Collator.items`."""
        return ItemPrompts(self.pack([self.writer.item_prompt(int(item)) for item in item_M]))

    def _user_prompts(self, shown: Histories, vectors_U: IntArray) -> list[Prompt]:
        """Prompts with one read-out per row, in order; a user's rows that extend each other may share a prompt.

        Args:
            shown: the events shown, of which the first `vectors_U` are bare item vectors.
        """
        events, vectors = events_of(shown), vectors_U.tolist()
        if self.writer.shows_user:  # each row injects a different user vector, so rows cannot share a prompt
            return [self.writer.user_prompt(*row, count) for row, count in zip(events, vectors, strict=True)]
        user_U = shown.user_U.tolist()
        first_G = [
            row
            for row in range(len(events))
            if row == 0
            or (user_U[row], vectors[row]) != (user_U[row - 1], vectors[row - 1])
            or not _extends(events[row], events[row - 1])
        ]
        return [
            prompt
            for first, end in zip(first_G, [*first_G, len(events)][1:], strict=True)
            for prompt in self.writer.user_prompts(*events[end - 1], shown.length_U[first:end], vectors[first])
        ]


def _extends(longer: tuple[IntArray, IntArray], shorter: tuple[IntArray, IntArray]) -> bool:
    """Whether the events of `longer` start with all events of `shorter` and go beyond them; False if that is empty."""
    length = len(shorter[0])
    return 0 < length < len(longer[0]) and all(
        np.array_equal(column[:length], other) for column, other in zip(longer, shorter, strict=True)
    )


def events_of(shown: Histories) -> list[tuple[IntArray, IntArray]]:
    """Items and times of each history, one pair of arrays per row."""
    bounds = zip(shown.offset_U1[:-1], shown.offset_U1[1:], strict=True)
    return [(shown.item_E[a:b], shown.time_E[a:b]) for a, b in bounds]


def vectors_of(shown: Histories, titled: int) -> IntArray:
    """(U,) how many of each history's items, the oldest ones, are bare item vectors; the last `titled` have titles."""
    vectors_U: IntArray = np.maximum(shown.length_U - titled, 0)
    return vectors_U


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
    # Padded to the longest of the *global* batch: the teacher's dropout masks then do not depend on the share.
    length = teacher.padded_length(int(every.end_Y.max()))
    before = every.take(share).before(mine, length)
    first = int((every.row_Y < share.start).sum())
    return ItemSequences(torch.from_numpy(before.padded(length)), BatchRows(first, len(before), len(every)))
