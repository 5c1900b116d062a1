"""User histories in columns: many sequences in a few flat arrays.

Letters: U users, E events (all users' sequences joined end to end).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from trainer.config import RepeatDates, Split, TrainingOrder
from trainer.data.reading.counter_rng import IntArray, hash64

_TRAINING_ORDER = 0x0BDE  # second part of the address of training orders, which shuffled histories do not have


@dataclass(frozen=True)
class Histories:
    """Item histories of users, each in time order."""

    user_U: IntArray
    """User indices."""
    offset_U1: IntArray
    """Events of row u are `item_E[offset_U1[u]:offset_U1[u + 1]]`, likewise `time_E`."""
    item_E: IntArray
    """Item ids, 1 to N."""
    time_E: IntArray
    """Milliseconds since 1970 UTC."""

    def __len__(self) -> int:
        return len(self.user_U)

    @property
    def length_U(self) -> IntArray:
        return np.diff(self.offset_U1)

    def take(self, index: IntArray | slice) -> Histories:
        """The users in these rows, in this order."""
        row = np.arange(len(self))[index]
        return self.select(row, self.offset_U1[row], self.length_U[row])

    def last(self, length: int) -> Histories:
        """Each user's `length` latest events."""
        kept = np.minimum(self.length_U, length)
        return self.select(np.arange(len(self)), self.offset_U1[1:] - kept, kept)

    def without_last(self) -> Histories:
        """All but each user's latest event."""
        return self.select(np.arange(len(self)), self.offset_U1[:-1], np.maximum(self.length_U - 1, 0))

    def last_item_U(self) -> IntArray:
        """Each user's latest item, (U,); no history may be empty."""
        return self.item_E[self.offset_U1[1:] - 1]

    def shuffled(self, seed: int) -> Histories:
        """Each user's items in random order at their old times: the paper's shuffled histories (§2.3).

        The order depends on (seed, user) alone.
        """
        row_E = np.repeat(np.arange(len(self)), self.length_U)
        position_E = np.arange(len(self.item_E)) - self.offset_U1[row_E]
        key_E = hash64(seed, self.user_U[row_E], position_E)
        return Histories(self.user_U, self.offset_U1, self.item_E[np.lexsort((key_E, row_E))], self.time_E)

    def shuffled_between(self, first_U: IntArray, last_U: IntArray, *address: int) -> Histories:
        """The items at positions `first_U` to `last_U` - 1 of each row in random order, at their old times.

        The order depends on (address, user) alone.
        """
        row_E = np.repeat(np.arange(len(self)), self.length_U)
        position_E = np.arange(len(self.item_E)) - self.offset_U1[row_E]
        # 0 before the range, 1 inside, 2 behind it; outside, the keys are equal and the stable sort keeps the order.
        part_E = (position_E >= first_U[row_E]).astype(np.int64) + (position_E >= last_U[row_E])
        key_E = np.where(part_E == 1, hash64(*address, self.user_U[row_E], position_E), np.uint64(0))
        return Histories(self.user_U, self.offset_U1, self.item_E[np.lexsort((key_E, part_E, row_E))], self.time_E)

    def padded(self, length: int) -> IntArray:
        """Item ids as (U, length): each user's latest items, left-padded with 0."""
        recent = self.last(length)
        padded_UL = np.zeros((len(self), length), np.int64)
        row_E = np.repeat(np.arange(len(self)), recent.length_U)
        from_end_E = recent.offset_U1[1:][row_E] - np.arange(len(recent.item_E))
        padded_UL[row_E, length - from_end_E] = recent.item_E
        return padded_UL

    def select(self, place: IntArray, start: IntArray, length: IntArray) -> Histories:
        """The rows `place`, each with the `length` events of `item_E` from index `start` on."""
        offset_U1 = np.concatenate([[0], np.cumsum(length)]).astype(np.int64)
        event = np.repeat(start - offset_U1[:-1], length) + np.arange(offset_U1[-1])
        return Histories(self.user_U[place], offset_U1, self.item_E[event], self.time_E[event])

    def followed_by(self, later: Histories) -> Histories:
        """Each user's events, then those that the same row has in `later`."""
        row_E = np.concatenate([np.repeat(np.arange(len(part)), part.length_U) for part in (self, later)])
        order = np.argsort(row_E, kind="stable")
        return Histories(
            self.user_U,
            self.offset_U1 + later.offset_U1,
            np.concatenate([self.item_E, later.item_E])[order],
            np.concatenate([self.time_E, later.time_E])[order],
        )

    @staticmethod
    def concatenate(parts: Sequence[Histories]) -> Histories:
        """Join the users of several parts, in order."""
        length = np.concatenate([part.length_U for part in parts])
        return Histories(
            np.concatenate([part.user_U for part in parts]),
            np.concatenate([[0], np.cumsum(length)]).astype(np.int64),
            np.concatenate([part.item_E for part in parts]),
            np.concatenate([part.time_E for part in parts]),
        )


@dataclass(frozen=True)
class Users:
    """Users with their training sequences and held-out items (0 where a user has none)."""

    train: Histories
    valid_item_U: IntArray
    valid_time_U: IntArray
    """Milliseconds since 1970 UTC, as is `test_time_U`."""
    test_item_U: IntArray
    test_time_U: IntArray
    valid_context: Histories | None = None
    """In a temporal split, what happened between the training sequence and the validation target; None: nothing."""
    test_context: Histories | None = None
    """What happened between the training sequence, or the validation target if there is one, and the test target."""
    num_test_targets_U: IntArray | None = None
    """How many test targets a user has: the test item, and the events right before it; None: the test item alone."""

    def __len__(self) -> int:
        return len(self.train)

    def take(self, index: IntArray | slice) -> Users:
        """The users in these rows, in this order."""
        return Users(
            self.train.take(index),
            self.valid_item_U[index],
            self.valid_time_U[index],
            self.test_item_U[index],
            self.test_time_U[index],
            None if self.valid_context is None else self.valid_context.take(index),
            None if self.test_context is None else self.test_context.take(index),
            None if self.num_test_targets_U is None else self.num_test_targets_U[index],
        )

    def trained(self) -> Users:
        """The users with a training sequence; the others only validate."""
        has_U = self.train.length_U > 0
        return self if has_U.all() else self.take(np.flatnonzero(has_U))

    def sequences(self) -> Histories:
        """The training sequences; of users who are left out of training, what precedes their validation target."""
        known, length_U = self._before_valid(), self.train.length_U
        return known.select(np.arange(len(self)), known.offset_U1[:-1], np.where(length_U, length_U, known.length_U))

    def last_targets(self) -> Users:
        """These users with one test target each, the last."""
        return replace(self, num_test_targets_U=None)

    def in_blocks(self, most_events: int) -> Iterator[Users]:
        """Blocks of users whose test histories have at most `most_events` together, or of one user: those of successive
        targets repeat each other, so that all of them may not fit into memory."""
        if self.num_test_targets_U is None:
            yield self
            return
        events_U = np.cumsum(self.num_test_targets_U * self.whole().length_U)
        start = 0
        while start < len(self):
            before = events_U[start - 1] if start else 0
            stop = max(int(np.searchsorted(events_U, before + most_events, side="right")), start + 1)
            yield self.take(slice(start, stop))
            start = stop

    def with_targets_after(self, time: int) -> Users:
        """These users with every event after a point in time, in ms, as a test target."""
        known = self.before_test()
        later_U = np.bincount(_row_E(known)[known.time_E > time], minlength=len(self))
        return replace(self, num_test_targets_U=np.where(self.test_item_U == 0, 0, later_U + 1))

    def targets(self, split: Split) -> tuple[Histories, IntArray]:
        """Input histories and target items (T,) of a split, of the users that have a target in it: one each, except in
        the test of a split with successive targets.

        The input is the training sequence for validation, and for test also the validation item, if any; in a temporal
        split, each with its context. A user's rows are adjacent, in order of time.
        """
        if split == "valid":
            has = np.flatnonzero(self.valid_item_U)
            return self._before_valid().take(has), self.valid_item_U[has]
        if self.num_test_targets_U is not None:
            return self._successive_targets(self.num_test_targets_U)
        has = np.flatnonzero(self.test_item_U)
        return self.before_test().take(has), self.test_item_U[has]

    def _successive_targets(self, number_U: IntArray) -> tuple[Histories, IntArray]:
        """Input histories and target items of all test targets."""
        whole = self.whole()
        row_T = np.repeat(np.arange(len(self)), number_U)
        # Number of the target among those of its user, from 0.
        target_T = np.arange(len(row_T)) - (np.cumsum(number_U) - number_U)[row_T]
        length_T = whole.length_U[row_T] - number_U[row_T] + target_T
        start_T = whole.offset_U1[row_T]
        return whole.select(row_T, start_T, length_T), whole.item_E[start_T + length_T]

    def _before_valid(self) -> Histories:
        return self.train if self.valid_context is None else self.train.followed_by(self.valid_context)

    def in_training_order(self, order: TrainingOrder, read: int, seed: int) -> Users:
        """These users with their training items in another order (`data.training_order`), the same at every call.

        Args:
            read: number of latest items that the system reads before a target.
        """
        if order == "original":
            return self
        length_U = self.train.length_U
        last_U = length_U if order == "sequence" else np.maximum(length_U - 1, 0)
        first_U = np.maximum(last_U - read, 0) if order == "window" else np.zeros_like(length_U)
        return replace(self, train=self.train.shuffled_between(first_U, last_U, seed, _TRAINING_ORDER))

    def dated(self, dates: RepeatDates) -> Users:
        """These users with `data.repeat_dates`; with `last`, all events of a user and an item have the latest time."""
        if dates == "own":
            return self
        latest = _LatestTimes.of(self.whole())
        row_U = np.arange(len(self))
        return Users(
            latest.dated(self.train),
            self.valid_item_U,
            latest.times(row_U, self.valid_item_U),
            self.test_item_U,
            latest.times(row_U, self.test_item_U),
            self.valid_context and latest.dated(self.valid_context),
            self.test_context and latest.dated(self.test_context),
            self.num_test_targets_U,
        )

    def before_test(self) -> Histories:
        """Training sequence and validation item, if any, with their contexts."""
        known = _append_present(self._before_valid(), self.valid_item_U, self.valid_time_U)
        return known if self.test_context is None else known.followed_by(self.test_context)

    def whole(self) -> Histories:
        """Training sequence, validation item and test item, if any."""
        return _append_present(self.before_test(), self.test_item_U, self.test_time_U)

    @staticmethod
    def concatenate(parts: Sequence[Users]) -> Users:
        """Join the users of several parts, in order."""
        return Users(
            Histories.concatenate([part.train for part in parts]),
            np.concatenate([part.valid_item_U for part in parts]),
            np.concatenate([part.valid_time_U for part in parts]),
            np.concatenate([part.test_item_U for part in parts]),
            np.concatenate([part.test_time_U for part in parts]),
            _concatenate_present([part.valid_context for part in parts]),
            _concatenate_present([part.test_context for part in parts]),
            _concatenate_numbers([part.num_test_targets_U for part in parts]),
        )


@dataclass(frozen=True)
class _LatestTimes:
    """The latest time of each pair of a user and an item. Letters: F pairs."""

    key_F: IntArray
    """row * `width` + item, ascending."""
    time_F: IntArray
    width: int

    @classmethod
    def of(cls, whole: Histories) -> _LatestTimes:
        """The pairs of these histories."""
        width = int(whole.item_E.max(initial=0)) + 1
        key_F, pair_E = np.unique(_row_E(whole) * width + whole.item_E, return_inverse=True)
        time_F = np.full(len(key_F), np.iinfo(np.int64).min)
        np.maximum.at(time_F, pair_E, whole.time_E)
        return cls(key_F, time_F, width)

    def times(self, row_E: IntArray, item_E: IntArray) -> IntArray:
        """Times of these pairs; 0 for item 0, which stands for none."""
        if not len(self.key_F):
            return np.zeros_like(item_E)
        place_E = np.minimum(np.searchsorted(self.key_F, row_E * self.width + item_E), len(self.key_F) - 1)
        return np.where(item_E == 0, 0, self.time_F[place_E])

    def dated(self, histories: Histories) -> Histories:
        """The same events, each at the latest time of its pair."""
        return replace(histories, time_E=self.times(_row_E(histories), histories.item_E))


def _row_E(histories: Histories) -> IntArray:
    return np.repeat(np.arange(len(histories)), histories.length_U)


def _concatenate_present(parts: Sequence[Histories | None]) -> Histories | None:
    """Join contexts, which all parts of a dataset have, or none."""
    present = [part for part in parts if part is not None]
    assert len(present) in (0, len(parts)), "parts of one dataset have the same columns"
    return Histories.concatenate(present) if present else None


def _concatenate_numbers(parts: Sequence[IntArray | None]) -> IntArray | None:
    """As `_concatenate_present`, for a number per user."""
    present = [part for part in parts if part is not None]
    assert len(present) in (0, len(parts)), "parts of one dataset have the same columns"
    return np.concatenate(present) if present else None


def _append_present(histories: Histories, item_U: IntArray, time_U: IntArray) -> Histories:
    """Append one event to the history of each user whose item is not 0."""
    has = item_U != 0
    end_X = histories.offset_U1[1:][has]  # np.insert counts positions before any insertion
    return Histories(
        histories.user_U,
        histories.offset_U1 + np.concatenate([[0], np.cumsum(has)]),
        np.insert(histories.item_E, end_X, item_U[has]),
        np.insert(histories.time_E, end_X, time_U[has]),
    )
