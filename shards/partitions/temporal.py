"""Global temporal split: everything up to a point in time is for training, and users are tested on what came after.

The rule is that of Gusak et al., *Time to Split* (RecSys'25): the point is a quantile of all event times. A
leave-one-out split, in contrast, trains on events that are later than most tests.
"""

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

Target = Literal["last", "first", "random"]
"""Which of a user's later events is the target; the events before it, later ones too, are its history."""
Validation = Literal["by-time", "last-train-item"]
"""Validate on a second, earlier point in time, or on each user's last event before the split."""

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

    def recorded(self, times: SplitTimes) -> dict[str, Scalar]:
        """The entries of the manifest about the split."""
        return {
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

    @property
    def times(self) -> SplitTimes:
        """As datasets store them."""
        return SplitTimes(round(self.test), None if self.valid is None else round(self.valid))


def check_temporal(split: TemporalSplit) -> None:
    """Check the options; raises DatasetError for those that cannot give a dataset."""
    if not 0 < split.quantile < 1:
        raise DatasetError(f"--quantile {split.quantile}: give a number between 0 and 1")


def split_points(times: Callable[[float | None], Iterable[npt.NDArray[np.int64]]], split: TemporalSplit) -> SplitPoints:
    """The points in time that split all events.

    Holds the times of all events in memory, twice for a moment: 16 bytes per event.

    Args:
        times: gives the times of all events up to a point, a part of the users at a time (`times_of`).
    """
    test = _quantile(list(times(None)), split.quantile)
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


def _quantile(times: list[npt.NDArray[np.int64]], quantile: float) -> float:
    return float(np.quantile(np.concatenate(times), quantile, overwrite_input=True))


def assign_temporal(
    frame: pl.DataFrame, split: TemporalSplit, points: SplitPoints, user_keys: UInt64Array, seed: int
) -> pl.DataFrame:
    """Add `split` to events ordered by (user, time, tie), and drop the events after a user's test target.

    Args:
        user_keys: hash of each user, by code; picks the random targets.
    """
    before_test = pl.col("time") <= points.test
    frame = frame.with_columns(pl.lit(TRAIN, pl.UInt8).alias("split"))
    if split.validation != "by-time":
        frame = _choose(frame, before_test, "last", user_keys, seed, (TRAIN, VALID, TRAIN))
    elif points.valid is not None:
        between = (pl.col("time") > points.valid) & before_test
        # What follows the validation target is history of the test target.
        frame = _choose(frame, between, split.target, user_keys, seed, (VALID_CONTEXT, VALID, TEST_CONTEXT))
    frame = _choose(frame, ~before_test, split.target, user_keys, seed, (TEST_CONTEXT, TEST, _UNUSED))
    # Without a test target, what leads to it is of no use.
    has_test = (pl.col("split") == TEST).any().over("user")
    useless = (pl.col("split") == _UNUSED) | ((pl.col("split") == TEST_CONTEXT) & ~has_test)
    return frame.filter(~useless)


def check_targets(parts: set[int]) -> None:
    """Check that both kinds of targets are among the parts of histories that all users together have.

    Raises:
        DatasetError: nothing is later than the point in time, because too many events have the latest time.
    """
    for part, name in ((VALID, "validation"), (TEST, "test")):
        if part not in parts:
            raise DatasetError(
                f"no event is late enough to be a {name} target: many events share the latest times; lower --quantile, "
                "or use --split leave-one-out"
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
