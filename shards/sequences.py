"""Builds one sequence per user from events: k-core filter, time order with seeded ties, and the split.

Follows the data protocol of the paper's code: by default the k-core filter is a single pass, with item and user counts
both taken before filtering, and a user needs `min_train` training items.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl

from shards.hashing import hash_strings, stream_key
from shards.manifest import DatasetError, Stage
from shards.readers.reviews import SPLITS, Events
from shards.splitmix import UInt64Array, mix
from shards.temporal import TEST, TEST_CONTEXT, TRAIN, VALID, VALID_CONTEXT, SplitTimes, TemporalSplit, assign_temporal

assert tuple(range(len(SPLITS))) == (TRAIN, VALID, TEST), "a source's own splits have the same numbers"


@dataclass(frozen=True)
class Filters:
    """Minimum interactions per user and item, and training items per user. `iterate`: repeat the k-core filter until
    nothing changes."""

    min_user: int = 5
    min_item: int = 5
    min_train: int = 5
    iterate: bool = False


@dataclass(frozen=True)
class Part:
    """Events of all users joined end to end: those of user u are `items[offsets[u]:offsets[u+1]]`, times in ms."""

    offsets: npt.NDArray[np.int64]
    items: npt.NDArray[np.int32]
    times: npt.NDArray[np.int64]


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
    """Interactions of all users: users 0..U-1 in the order of a seeded hash, items 1..N in the order of raw ids.

    The training part of user u is `items[offsets[u]:offsets[u+1]]` with `times` (ms), in time order. Item 0 in
    `valid_items` or `test_items` means that the user has none. `user_keys` are hashes of the raw user ids; `tied_pairs`
    counts neighbours at the same time.
    """

    user_ids: pl.Series
    item_ids: pl.Series
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

    @property
    def num_users(self) -> int:
        """Number of users U."""
        return len(self.user_ids)

    @property
    def num_items(self) -> int:
        """Number of items N; item ids are 1 to N."""
        return len(self.item_ids)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Number of interactions of each user, validation and test included."""
        targets = (self.valid_items > 0).astype(np.int64) + (self.test_items > 0)
        between = [np.diff(part.offsets) for part in (self.contexts.valid, self.contexts.test)] if self.contexts else []
        return sum(between, np.diff(self.offsets) + targets)

    @property
    def users_out_of_order(self) -> int:
        """Number of users with a held-out event older than the events before it; only a source's own split has them."""
        last = self.times[self.offsets[1:] - 1]
        valid_early = (self.valid_items > 0) & (self.valid_times < last)
        test_early = (self.test_items > 0) & (self.test_times < np.maximum(last, self.valid_times))
        return int((valid_early | test_early).sum())


def count(name: str, frame: pl.DataFrame) -> Stage:
    """Count the users, items and interactions in a frame of events."""
    return Stage(name, frame["user"].n_unique(), frame["item"].n_unique(), frame.height)


def deduplicate(events: Events) -> tuple[Events, int]:
    """Drop repeats of (user, item, time), keeping the one in the latest split; returns also the number dropped."""
    frame = events.frame
    others = {"split": pl.col("split").max(), "row": pl.col("row").min()}
    kept = [others[name] for name in frame.columns if name in others]
    unique = frame.group_by("user", "item", "time").agg(kept) if kept else frame.unique(["user", "item", "time"])
    return Events(unique, events.users, events.items), frame.height - unique.height


def filter_counts(frame: pl.DataFrame, filters: Filters) -> pl.DataFrame:
    """Apply the k-core filter, in a single pass or iterated to the fixed point."""
    while True:
        enough = (pl.len().over("item") >= filters.min_item) & (pl.len().over("user") >= filters.min_user)
        kept = frame.filter(enough)
        if not filters.iterate or kept.height == frame.height:
            return kept
        frame = kept


def assign_splits(frame: pl.DataFrame) -> pl.DataFrame:
    """Add `split` to events ordered by (user, time, tie): a user's last event is test, the one before it valid."""
    from_end = pl.int_range(pl.len(), dtype=pl.Int64).reverse().over("user")
    split = pl.when(from_end == 0).then(TEST).when(from_end == 1).then(VALID).otherwise(TRAIN)
    return frame.with_columns(split.cast(pl.UInt8).alias("split"))


def build_sequences(
    events: Events,
    filters: Filters,
    seed: int,
    before: tuple[Stage, ...] = (),
    temporal: TemporalSplit | None = None,
) -> tuple[Sequences, tuple[Stage, ...]]:
    """Filter, order, split and renumber; returns also the stages: those of `before`, then `k-core` and `min-train`.

    Args:
        temporal: split at a point in time; None: leave the last events out, or take the split of the source.

    Raises:
        DatasetError: nothing is left (with the counts of all stages), a split of the source is not leave-last-out, or
            it has one beside a temporal split.
    """
    if temporal is not None and events.given_split:
        raise DatasetError("--split temporal: the source is split already: give unsplit reviews with --source table")
    stages = list(before)
    kept = filter_counts(events.frame, filters)
    stages.append(count("k-core", kept))
    if not kept.height:
        raise _nothing_left(stages, "--min-user or --min-item")
    user_keys = hash_strings(events.users, stream_key(seed, "users"))
    item_keys = hash_strings(events.items, stream_key(seed, "items"))
    ordered = _order(kept, user_keys, item_keys, seed)
    split_times = None
    if temporal is not None:
        ordered, split_times = assign_temporal(ordered, temporal, user_keys, seed)
    elif not events.given_split:
        ordered = assign_splits(ordered)
    train = pl.col("split") == TRAIN
    ordered = ordered.filter(train.sum().over("user") >= filters.min_train)
    stages.append(count("min-train", ordered))
    if not ordered.height:
        raise _nothing_left(stages, "--min-train")
    if temporal is None:
        _check_single(ordered, events)
    return _renumber(ordered, events, user_keys, split_times), tuple(stages)


def check_filters(filters: Filters) -> None:
    """Check the thresholds; raises DatasetError for those that cannot give a dataset."""
    if filters.min_train < 2:
        raise DatasetError(
            f"--min-train {filters.min_train}: a training example needs a history and a target: give at least 2"
        )
    if filters.min_user < 1 or filters.min_item < 1:
        raise DatasetError("--min-user and --min-item count events: give at least 1")


def _nothing_left(stages: list[Stage], options: str) -> DatasetError:
    counts = "; ".join(f"{stage.name}: {stage.users:,} users, {stage.items:,} items" for stage in stages)
    return DatasetError(f"nothing is left after filtering ({counts}): lower {options}, or raise --user-fraction")


def _order(frame: pl.DataFrame, user_keys: UInt64Array, item_keys: UInt64Array, seed: int) -> pl.DataFrame:
    """Sort by (user, time, seeded hash): breaking ties by item id or file order would plant a false order.

    Events that kept their row number (`--ties file`) are sorted by it instead of the hash.
    """
    if "row" in frame.columns:
        return frame.sort("user", "time", "row").drop("row")
    tie = mix(user_keys[frame["user"].to_numpy()] ^ stream_key(seed, "ties"))
    tie = mix(tie + item_keys[frame["item"].to_numpy()])
    tie = mix(tie + frame["time"].to_numpy().astype(np.uint64))
    # The item comes last, for a total order even if two hashes collide.
    return frame.with_columns(pl.Series("tie", tie)).sort("user", "time", "tie", "item").drop("tie")


def _check_single(ordered: pl.DataFrame, events: Events) -> None:
    """Check that users have at most one validation and one test event, as a split of the source may not."""
    twice = ordered.filter(pl.col("split") != TRAIN).filter(pl.len().over("user", "split") > 1)
    if twice.height:
        row = twice.row(0, named=True)
        raise DatasetError(
            f"user {events.users[row['user']]!r} has several {SPLITS[row['split']]} events: "
            "give a leave-last-out split, or the unsplit reviews with --source table"
        )


def _renumber(
    ordered: pl.DataFrame, events: Events, user_keys: UInt64Array, split_times: SplitTimes | None
) -> Sequences:
    """Renumber users by their hash and items by their raw id, and store the sequences as flat arrays."""
    item_codes = ordered["item"].unique().sort().to_numpy()
    new_item_id = np.zeros(len(events.items), dtype=np.int32)
    new_item_id[item_codes] = np.arange(1, len(item_codes) + 1, dtype=np.int32)
    user_codes = ordered["user"].unique().sort().to_numpy()
    # Codes ascend with the raw id, so a stable sort breaks (unlikely) equal hashes by raw id.
    user_codes = user_codes[np.argsort(user_keys[user_codes], kind="stable")]
    new_user_index = np.zeros(len(events.users), dtype=np.int64)
    new_user_index[user_codes] = np.arange(len(user_codes))

    users = new_user_index[ordered["user"].to_numpy()]
    by_user = np.argsort(users, kind="stable")
    users = users[by_user]
    items = new_item_id[ordered["item"].to_numpy()][by_user]
    times = ordered["time"].to_numpy()[by_user]
    split = ordered["split"].to_numpy()[by_user]
    train, to_valid, to_test = (
        _part(users, items, times, split == part, len(user_codes)) for part in (TRAIN, VALID_CONTEXT, TEST_CONTEXT)
    )
    held_out = [_held_out(users, items, times, split == part, len(user_codes)) for part in (VALID, TEST)]
    return Sequences(
        user_ids=events.users.gather(user_codes),
        item_ids=events.items.gather(item_codes),
        user_keys=user_keys[user_codes],
        offsets=train.offsets,
        items=train.items,
        times=train.times,
        valid_items=held_out[0][0],
        valid_times=held_out[0][1],
        test_items=held_out[1][0],
        test_times=held_out[1][1],
        tied_pairs=int(((users[1:] == users[:-1]) & (times[1:] == times[:-1])).sum()),
        contexts=None if split_times is None else Contexts(to_valid, to_test, split_times),
    )


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
