"""Global temporal split: everything up to a point in time is for training, and users are tested on what came after.

The rule is that of Gusak et al., *Time to Split* (RecSys'25): the point is a quantile of all event times. A
leave-one-out split, in contrast, trains on events that are later than most tests.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import polars as pl

from shards.hashing import stream_key
from shards.manifest import DatasetError, Scalar
from shards.partitions.events import Events
from shards.sequences import SplitTimes
from shards.splitmix import UInt64Array, mix

Target = Literal["last", "first", "random", "successive"]
"""Which of a user's later events is the target; the events before it, later ones too, are its history. `successive`:
each of them in turn in the test, and the last one in the validation."""
Validation = Literal["by-time", "by-user", "last-train-item"]
"""Validate on a second, earlier point in time; on users who are left out of training, each on the last event before the
split; or on each user's last event before the split."""

TRAIN, VALID, TEST, VALID_CONTEXT, TEST_CONTEXT = range(5)
"""Parts of a history in a temporal split. A context is what happened between the parts before it and the target."""
_UNUSED = 5


@dataclass(frozen=True)
class TemporalSplit:
    """Options of a global temporal split."""

    quantile: float = 0.9
    """Share of all events, by time, that is not held out for the test. Also that of the training events, for
    validation by time."""
    target: Target = "last"
    validation: Validation = "by-time"
    validation_users: int = 500
    """Users left out of training for validation by user, chosen by a seeded hash."""

    @property
    def stored_target(self) -> Target:
        """The target that is stored as one: of successive ones the last, before which readers find the others."""
        return "last" if self.target == "successive" else self.target

    def recorded(self, times: SplitTimes, later_events: int) -> dict[str, Scalar]:
        """The entries of the manifest about the split.

        Args:
            later_events: events after the point in time.
        """
        more: dict[str, Scalar] = {}
        if self.validation == "by-user":
            more["split_validation_users"] = self.validation_users
        if self.target == "successive":
            more["split_test_targets"] = later_events
        return more | {
            "split": "temporal",
            "split_quantile": self.quantile,
            "split_target": self.target,
            "split_validation": self.validation,
            "split_time": times.test,
            "split_valid_time": times.valid,
        }


@dataclass(frozen=True)
class SplitPoints:
    """Points in time in ms, not rounded."""

    test: float
    valid: float | None
    """None: validation is not by time, or no user has two events before the test."""
    valid_draw: int | None = None
    """Users who can (`draws_of`) validate up to this draw, and are not trained on; None: validation is not by user."""

    @property
    def times(self) -> SplitTimes:
        """As datasets store them. Rounded down: event times are whole, so that the same events are later."""
        return SplitTimes(math.floor(self.test), None if self.valid is None else math.floor(self.valid))


def check_temporal(split: TemporalSplit) -> None:
    """Check the options; raises DatasetError for those that cannot give a dataset."""
    if not 0 < split.quantile < 1:
        raise DatasetError(f"--quantile {split.quantile}: give a number between 0 and 1")
    if split.validation_users < 1:
        raise DatasetError(f"--validation-users {split.validation_users}: give at least 1")


def split_points(
    times: Callable[[float | None], Iterable[npt.NDArray[np.int64]]],
    draws: Callable[[float], Iterable[UInt64Array]],
    split: TemporalSplit,
) -> SplitPoints:
    """The points in time that split all events, and the users who validate.

    Holds the times of all events in memory, twice for a moment: 16 bytes per event.

    Args:
        times: gives the times of all events up to a point, a part of the users at a time (`times_of`).
        draws: likewise gives `draws_of` the users.

    Raises:
        DatasetError: validation by user would leave no user to train on.
    """
    test = _quantile(list(times(None)), split.quantile)
    if split.validation == "by-user":
        return SplitPoints(test, None, _last_draw(np.concatenate(list(draws(test))), split.validation_users))
    if split.validation != "by-time":
        return SplitPoints(test, None)
    early = list(times(test))
    return SplitPoints(test, _quantile(early, split.quantile) if sum(map(len, early)) else None)


def times_of(events: Events, until: float | None) -> npt.NDArray[np.int64]:
    """Times of events that count for a point of the split, in ms.

    Args:
        until: the point of the test; None: all events. Users with a single event before it train nothing, so their
            events do not count.
    """
    frame = events.frame
    if until is not None:
        frame = frame.filter(pl.col("time") <= until).filter(pl.len().over("user") >= 2)
    return frame["time"].to_numpy()


def draws_of(events: Events, until: float, min_train: int, seed: int) -> UInt64Array:
    """Random numbers of the users who can validate by user: of their events up to the point `until`, the last one is
    the target, and at least `min_train` come before it."""
    early = events.frame.filter(pl.col("time") <= until)
    many_U = np.bincount(early["user"].to_numpy(), minlength=len(events.users)) > min_train
    return _valid_draws(events.user_keys, seed)[many_U]


def _valid_draws(user_keys: UInt64Array, seed: int) -> UInt64Array:
    return mix(user_keys ^ stream_key(seed, "validation users"))


def _last_draw(draws: UInt64Array, number: int) -> int:
    """The draw of the last user who validates."""
    if len(draws) < 2:
        raise DatasetError(
            f"--validation by-user: {len(draws)} users have more than --min-train events before the split: lower it"
        )
    if number >= len(draws):
        raise DatasetError(
            f"--validation-users {number:,}: only {len(draws):,} users have more than --min-train events before the "
            "split, and some have to be left to train on: lower one of the two"
        )
    return int(np.partition(draws, number - 1)[number - 1])


def _quantile(times: list[npt.NDArray[np.int64]], quantile: float) -> float:
    return float(np.quantile(np.concatenate(times), quantile, overwrite_input=True))


def assign_temporal(
    frame: pl.DataFrame,
    split: TemporalSplit,
    points: SplitPoints,
    user_keys: UInt64Array,
    seed: int,
    min_train: int,
) -> pl.DataFrame:
    """Add `split` to events ordered by (user, time, tie), and drop the events after a user's test target, and users
    with fewer than `min_train` events to train or to validate on.

    Args:
        user_keys: hash of each user, by code; picks the random targets and the users who validate.
    """
    before_test = pl.col("time") <= points.test
    frame = frame.with_columns(pl.lit(TRAIN, pl.UInt8).alias("split"))
    if points.valid_draw is not None:
        is_drawn_U = _valid_draws(user_keys, seed) <= points.valid_draw
        frame = frame.with_columns(pl.Series("drawn", is_drawn_U[frame["user"].to_numpy()]))
        among = pl.col("drawn") & before_test & ((before_test.sum() > min_train).over("user"))
        frame = _choose(frame, among, "last", user_keys, seed, (VALID_CONTEXT, VALID, TEST_CONTEXT)).drop("drawn")
    elif split.validation == "last-train-item":
        frame = _choose(frame, before_test, "last", user_keys, seed, (TRAIN, VALID, TRAIN))
    elif points.valid is not None:
        between = (pl.col("time") > points.valid) & before_test
        # What follows the validation target is history of the test target.
        frame = _choose(frame, between, split.stored_target, user_keys, seed, (VALID_CONTEXT, VALID, TEST_CONTEXT))
    frame = _choose(frame, ~before_test, split.stored_target, user_keys, seed, (TEST_CONTEXT, TEST, _UNUSED))
    # Without a test target, what leads to it is of no use.
    has_test = (pl.col("split") == TEST).any().over("user")
    useless = (pl.col("split") == _UNUSED) | ((pl.col("split") == TEST_CONTEXT) & ~has_test)
    frame = frame.filter(~useless)
    known = pl.col("split") == TRAIN
    if points.valid_draw is not None:
        known |= pl.col("split") == VALID_CONTEXT
    return frame.filter((known.sum() >= min_train).over("user"))


def check_targets(parts: set[int]) -> None:
    """Check that both kinds of targets are among the parts of histories that all users together have.

    Raises:
        DatasetError: nothing is later than the point in time, because too many events have the latest time.
    """
    for part, name in ((VALID, "validation"), (TEST, "test")):
        if part not in parts:
            raise DatasetError(
                f"no event of a user with --min-train training items is late enough to be a {name} target, perhaps "
                "because many share the latest times: lower --quantile or --min-train, or use --split leave-one-out"
            )


def _choose(
    frame: pl.DataFrame,
    among: pl.Expr,
    target: Target,
    user_keys: UInt64Array,
    seed: int,
    parts: tuple[int, int, int],
) -> pl.DataFrame:
    """Set `split` of the events `among`: to the three parts before, at and after each user's target."""
    draws = mix(user_keys[frame["user"].to_numpy()] ^ stream_key(seed, "targets"))
    frame = frame.with_columns(
        among.alias("among"),
        among.cum_sum().over("user").cast(pl.Int64).alias("place"),  # from 1
        among.sum().over("user").cast(pl.Int64).alias("number"),
        pl.Series("draw", draws >> np.uint64(1)).cast(pl.Int64),
    )
    chosen = {
        "last": pl.col("number"),
        "first": pl.lit(1, pl.Int64),
        "random": 1 + pl.col("draw") % pl.col("number").clip(lower_bound=1),
    }[target]
    before, at, after = (pl.lit(part, pl.UInt8) for part in parts)
    part = (
        pl.when(~pl.col("among"))
        .then(pl.col("split"))
        .when(pl.col("place") < chosen)
        .then(before)
        .when(pl.col("place") == chosen)
        .then(at)
        .otherwise(after)
    )
    return frame.with_columns(part.alias("split")).drop("among", "place", "number", "draw")
