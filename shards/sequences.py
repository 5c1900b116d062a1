"""One sequence per user: what a dataset holds of its users, or of a part of them."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import polars as pl

from shards.manifest import DatasetError
from shards.splitmix import UInt64Array


@dataclass(frozen=True)
class Filters:
    """Minimum interactions per user and item, and training items per user. `iterate`: repeat the k-core filter until
    nothing changes."""

    min_user: int = 5
    min_item: int = 5
    min_train: int = 5
    iterate: bool = False


@dataclass(frozen=True)
class SplitTimes:
    """Points in time of a temporal split in ms, rounded down; training events are not later than the earlier one."""

    test: int
    valid: int | None
    """None: validation is not by time."""


@dataclass(frozen=True)
class Part:
    """Events of all users joined end to end: those of user u are `items[offsets[u]:offsets[u+1]]`, times in ms."""

    offsets: npt.NDArray[np.int64]
    items: npt.NDArray[np.int32]
    times: npt.NDArray[np.int64]

    def users(self, start: int, stop: int) -> "Part":
        """The events of users `start` to `stop` - 1."""
        offsets = self.offsets[start : stop + 1]
        events = slice(offsets[0], offsets[-1])
        return Part(offsets - offsets[0], self.items[events], self.times[events])

    @staticmethod
    def join(parts: Sequence["Part"]) -> "Part":
        """The users of several parts, in order."""
        lengths = [np.diff(part.offsets) for part in parts]
        return Part(
            np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int64),
            np.concatenate([part.items for part in parts]),
            np.concatenate([part.times for part in parts]),
        )


@dataclass(frozen=True)
class Contexts:
    """In a temporal split, what lies between training and the targets, and is part of their histories."""

    valid: Part
    """Between the training sequence and the validation target."""
    test: Part
    """Between what precedes it and the test target."""
    split_times: SplitTimes


@dataclass(frozen=True)
class Sequences:
    """Interactions of consecutive users: all of a dataset, or a part of them.

    Users are in the order of a seeded hash, items 1..N in the order of raw ids. The training part of user u is
    `items[offsets[u]:offsets[u+1]]` with `times` (ms), in time order. Item 0 in `valid_items` or `test_items` means
    that the user has none. `user_keys` are hashes of the raw user ids; `tied_pairs` counts neighbours at the same time.
    """

    user_ids: pl.Series
    user_keys: UInt64Array
    offsets: npt.NDArray[np.int64]
    items: npt.NDArray[np.int32]
    times: npt.NDArray[np.int64]
    valid_items: npt.NDArray[np.int32]
    valid_times: npt.NDArray[np.int64]
    test_items: npt.NDArray[np.int32]
    test_times: npt.NDArray[np.int64]
    tied_pairs: int
    contexts: Contexts | None = None
    """None: a leave-last-out split, which has none."""
    first_user: int = 0
    """Index of the first user in the dataset, as far as it is known (`regrouped`)."""

    @property
    def num_users(self) -> int:
        """Number of users U."""
        return len(self.user_ids)

    @property
    def train(self) -> Part:
        """The training sequences."""
        return Part(self.offsets, self.items, self.times)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Number of interactions of each user, validation and test included."""
        targets = (self.valid_items > 0).astype(np.int64) + (self.test_items > 0)
        between = [np.diff(part.offsets) for part in (self.contexts.valid, self.contexts.test)] if self.contexts else []
        return sum(between, np.diff(self.offsets) + targets)

    @property
    def users_out_of_order(self) -> int:
        """Number of users with a held-out event older than the events before it; only a source's own split has them."""
        if self.contexts is not None:  # split by time
            return 0
        last = self.times[self.offsets[1:] - 1]
        valid_early = (self.valid_items > 0) & (self.valid_times < last)
        test_early = (self.test_items > 0) & (self.test_times < np.maximum(last, self.valid_times))
        return int((valid_early | test_early).sum())

    def users(self, start: int, stop: int) -> "Sequences":
        """Users `start` to `stop` - 1 of these; their `tied_pairs` are not counted."""
        chosen = slice(start, stop)
        train = self.train.users(start, stop)
        return Sequences(
            user_ids=self.user_ids[chosen],
            user_keys=self.user_keys[chosen],
            offsets=train.offsets,
            items=train.items,
            times=train.times,
            valid_items=self.valid_items[chosen],
            valid_times=self.valid_times[chosen],
            test_items=self.test_items[chosen],
            test_times=self.test_times[chosen],
            tied_pairs=0,
            contexts=self.contexts
            and replace(
                self.contexts,
                valid=self.contexts.valid.users(start, stop),
                test=self.contexts.test.users(start, stop),
            ),
            first_user=self.first_user + start,
        )


def join(parts: Sequence[Sequences]) -> Sequences:
    """The users of several parts that follow one another."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    train = Part.join([part.train for part in parts])
    contexts = [part.contexts for part in parts if part.contexts is not None]
    return Sequences(
        user_ids=pl.concat([part.user_ids for part in parts]),
        user_keys=np.concatenate([part.user_keys for part in parts]),
        offsets=train.offsets,
        items=train.items,
        times=train.times,
        valid_items=np.concatenate([part.valid_items for part in parts]),
        valid_times=np.concatenate([part.valid_times for part in parts]),
        test_items=np.concatenate([part.test_items for part in parts]),
        test_times=np.concatenate([part.test_times for part in parts]),
        tied_pairs=sum(part.tied_pairs for part in parts),
        contexts=replace(
            contexts[0],
            valid=Part.join([context.valid for context in contexts]),
            test=Part.join([context.test for context in contexts]),
        )
        if contexts
        else None,
        first_user=first.first_user,
    )


def regrouped(parts: Iterable[Sequences], bounds: Sequence[int]) -> Iterator[Sequences]:
    """Users `bounds[i]` to `bounds[i + 1]` - 1, for each i, with the index of the first; `parts` have all users of the
    dataset in order."""
    left = iter(parts)
    held: list[Sequences] = []
    users = 0
    for start, stop in itertools.pairwise(bounds):
        while not held or held[-1].first_user + held[-1].num_users < stop:
            held.append(replace(next(left), first_user=users))
            users += held[-1].num_users
        pieces = [part.users(max(start - part.first_user, 0), stop - part.first_user) for part in held]
        yield join(pieces)
        held = [part for part in held if part.first_user + part.num_users > stop]


def check_filters(filters: Filters) -> None:
    """Check the thresholds; raises DatasetError for those that cannot give a dataset."""
    if filters.min_train < 2:
        raise DatasetError(
            f"--min-train {filters.min_train}: a training example needs a history and a target: give at least 2"
        )
    if filters.min_user < 1 or filters.min_item < 1:
        raise DatasetError("--min-user and --min-item count events: give at least 1")
