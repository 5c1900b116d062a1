"""Builds sequences from events, a part of the users at a time: k-core filter, split, and numbers of users and items.

Follows the data protocol of the paper's code: by default the k-core filter is a single pass, with item and user counts
both taken before filtering, and a user needs `min_train` training items.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt
import polars as pl

from shards.manifest import DatasetError, Stage
from shards.partitions.clean import k_core
from shards.partitions.engine import Parts
from shards.partitions.events import Events, Tally
from shards.partitions.temporal import (
    TEST,
    TEST_CONTEXT,
    TRAIN,
    VALID,
    VALID_CONTEXT,
    SplitPoints,
    TemporalSplit,
    assign_temporal,
    check_targets,
    draws_of,
    split_points,
    times_of,
)
from shards.readers.reviews import SPLITS
from shards.sequences import Contexts, Filters, Part, Sequences, SplitTimes, join
from shards.splitmix import UInt64Array

assert tuple(range(len(SPLITS))) == (TRAIN, VALID, TEST), "a source's own splits have the same numbers"


@dataclass(frozen=True)
class AllSequences:
    """The sequences of a whole dataset; item i has the raw id `item_ids[i - 1]`."""

    parts: Parts[Sequences]
    num_users: int
    """Number of users U."""
    item_ids: pl.Series
    split_times: SplitTimes | None
    """None: not a temporal split."""
    later_events: int = 0
    """Events after the point in time of a temporal split, up to the last target of each user."""

    @property
    def num_items(self) -> int:
        """Number of items N; item ids are 1 to N."""
        return len(self.item_ids)

    def together(self) -> Sequences:
        """All users at once."""
        return join(list(self.parts))


def build_sequences(
    parts: Parts[Events],
    items: pl.Series,
    filters: Filters,
    seed: int,
    before: tuple[Stage, ...] = (),
    temporal: TemporalSplit | None = None,
    tally: Tally | None = None,
) -> tuple[AllSequences, tuple[Stage, ...]]:
    """Filter, split and number events in order; returns also the stages: those of `before`, then `k-core` and
    `min-train`. Parts in files are used up.

    Args:
        items: raw ids by item code.
        temporal: split at a point in time; None: leave the last events out, or take the split of the source.
        tally: counts of the parts, if they are known.

    Raises:
        DatasetError: nothing is left (with the counts of all stages), a split of the source is not leave-last-out, or
            it has one beside a temporal split.
    """
    tally = tally or _counted(parts, len(items))
    stages = list(before)
    parts, left = k_core(parts, tally, filters)
    stages.append(left.stage("k-core"))
    if not left.interactions:
        raise _nothing_left(stages, "--min-user or --min-item")
    points = None
    if temporal is not None:
        draws = partial(_draws, parts, min_train=filters.min_train, seed=seed)
        points = split_points(partial(_times, parts), draws, temporal)
    found = _Split(len(items))
    split = partial(
        _split_part, num_items=len(items), min_train=filters.min_train, temporal=temporal, points=points, seed=seed
    )
    sequences = parts.map(split, "split", found.add)
    stages.append(found.trained.stage("min-train"))
    if not found.trained.interactions:
        raise _nothing_left(stages, "--min-train")
    if temporal is not None:
        check_targets(found.kinds)
    trained_N = found.trained.item_count_N > 0
    # Items that are left are numbered in the order of their codes; code 0 stays 0: no item.
    new_id_N = np.concatenate([[0], np.cumsum(trained_N)]).astype(np.int32)
    numbered = sequences.map(partial(_numbered, new_id_N=new_id_N), "numbering", lambda _: None)
    item_ids = items.filter(pl.Series(trained_N))
    times = points.times if points is not None else None
    return AllSequences(numbered, found.trained.users, item_ids, times, found.later_events), tuple(stages)


class _Split:
    """Counts that the split finds, in one part or in all of them."""

    def __init__(self, num_items: int) -> None:
        self.trained = Tally(num_items)
        """Counts of the users who have enough training items."""
        self.kinds: set[int] = set()
        """Parts of histories that there are (`temporal.TRAIN` and so on)."""
        self.later_events = 0
        """Events after the point in time of a temporal split: the test targets, if they are successive."""

    def add(self, other: "_Split") -> None:
        """Add what was found in another part."""
        self.trained.add(other.trained)
        self.kinds |= other.kinds
        self.later_events += other.later_events


def _split_part(
    events: Events,
    num_items: int,
    min_train: int,
    temporal: TemporalSplit | None,
    points: SplitPoints | None,
    seed: int,
) -> tuple[Sequences, _Split]:
    found = _Split(num_items)
    frame = events.frame
    if temporal is not None and points is not None:
        if "split" in frame.columns:
            raise DatasetError(
                "--split temporal: the source is split already: give unsplit reviews with --source table"
            )
        frame = assign_temporal(frame, temporal, points, events.user_keys, seed, min_train)
        found.kinds.update(frame["split"].unique())
        found.later_events = frame.filter(pl.col("time") > points.test).height
    else:
        frame = frame if "split" in frame.columns else assign_splits(frame)
        user_E = frame["user"].to_numpy()
        train_U = np.bincount(user_E, frame["split"].to_numpy() == TRAIN)
        frame = frame.filter((train_U >= min_train)[user_E])
        _check_single(frame, events.users)
    found.trained = Tally.of(frame, num_items)
    return _sequences(frame, events, points.times if points is not None else None), found


def _times(parts: Parts[Events], until: float | None) -> Iterator[npt.NDArray[np.int64]]:
    return parts.each(partial(times_of, until=until))


def _draws(parts: Parts[Events], until: float, min_train: int, seed: int) -> Iterator[UInt64Array]:
    return parts.each(partial(draws_of, until=until, min_train=min_train, seed=seed))


def assign_splits(frame: pl.DataFrame) -> pl.DataFrame:
    """Add `split` to events ordered by (user, time, tie): a user's last event is test, the one before it valid."""
    user_E = frame["user"].to_numpy()
    # Users follow one another, so the last events are those whose user differs from that of one or two events later.
    split_E = np.full(len(user_E), TRAIN, np.uint8)
    split_E[:-1][user_E[:-1] != user_E[1:]] = TEST
    split_E[-1:] = TEST
    second_E = np.append(split_E[1:] == TEST, False) & (split_E != TEST)
    split_E[second_E] = VALID
    return frame.with_columns(pl.Series("split", split_E))


def _counted(parts: Parts[Events], num_items: int) -> Tally:
    tally = Tally(num_items)
    for part in parts.each(partial(_tally, num_items=num_items)):
        tally.add(part)
    return tally


def _tally(events: Events, num_items: int) -> Tally:
    return Tally.of(events.frame, num_items)


def _nothing_left(stages: list[Stage], options: str) -> DatasetError:
    counts = "; ".join(f"{stage.name}: {stage.users:,} users, {stage.items:,} items" for stage in stages)
    return DatasetError(f"nothing is left after filtering ({counts}): lower {options}, or raise --user-fraction")


def _check_single(ordered: pl.DataFrame, users: pl.Series) -> None:
    """Check that users have at most one validation and one test event, as a split of the source may not."""
    twice = ordered.filter(pl.col("split") != TRAIN).filter(pl.len().over("user", "split") > 1)
    if twice.height:
        row = twice.row(0, named=True)
        raise DatasetError(
            f"user {users[row['user']]!r} has several {SPLITS[row['split']]} events: "
            "give a leave-last-out split, or the unsplit reviews with --source table"
        )


def _sequences(frame: pl.DataFrame, events: Events, split_times: SplitTimes | None) -> Sequences:
    """The users of ordered events with a split; items are codes, from 1."""
    code_E, item_E = frame["user"].to_numpy(), frame["item"].to_numpy().astype(np.int32) + np.int32(1)
    time_E, split_E = frame["time"].to_numpy(), frame["split"].to_numpy()
    present_U = np.bincount(code_E, minlength=len(events.users)) > 0
    number = int(present_U.sum())
    user_E = (np.cumsum(present_U) - 1)[code_E]
    train, to_valid, to_test = (
        _part(user_E, item_E, time_E, split_E == part, number) for part in (TRAIN, VALID_CONTEXT, TEST_CONTEXT)
    )
    held_out = [_held_out(user_E, item_E, time_E, split_E == part, number) for part in (VALID, TEST)]
    return Sequences(
        user_ids=events.users.filter(pl.Series(present_U)),
        user_keys=events.user_keys[present_U],
        offsets=train.offsets,
        items=train.items,
        times=train.times,
        valid_items=held_out[0][0],
        valid_times=held_out[0][1],
        test_items=held_out[1][0],
        test_times=held_out[1][1],
        tied_pairs=int(((user_E[1:] == user_E[:-1]) & (time_E[1:] == time_E[:-1])).sum()),
        contexts=None if split_times is None else Contexts(to_valid, to_test, split_times),
    )


def _numbered(part: Sequences, new_id_N: npt.NDArray[np.int32]) -> tuple[Sequences, None]:
    contexts = part.contexts
    if contexts is not None:
        valid, test = (replace(each, items=new_id_N[each.items]) for each in (contexts.valid, contexts.test))
        contexts = replace(contexts, valid=valid, test=test)
    items, valid_items, test_items = (new_id_N[each] for each in (part.items, part.valid_items, part.test_items))
    numbered = replace(part, items=items, valid_items=valid_items, test_items=test_items, contexts=contexts)
    return numbered, None


def _part(
    users: npt.NDArray[np.int64],
    items: npt.NDArray[np.int32],
    times: npt.NDArray[np.int64],
    chosen: npt.NDArray[np.bool_],
    num_users: int,
) -> Part:
    """The `chosen` events of each user."""
    offsets = np.concatenate([[0], np.cumsum(np.bincount(users[chosen], minlength=num_users))]).astype(np.int64)
    return Part(offsets, items[chosen], times[chosen])


def _held_out(
    users: npt.NDArray[np.int64],
    items: npt.NDArray[np.int32],
    times: npt.NDArray[np.int64],
    chosen: npt.NDArray[np.bool_],
    num_users: int,
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """Item and time (ms) of each user's `chosen` event; 0 for users without one."""
    item = np.zeros(num_users, dtype=np.int32)
    time = np.zeros(num_users, dtype=np.int64)
    item[users[chosen]] = items[chosen]
    time[users[chosen]] = times[chosen]
    return item, time
