"""Puts the events of each user in order, and drops repeats.

Letters: E events, X events whose user has several at that time.
"""

import numpy as np
import numpy.typing as npt
import polars as pl

from shards.hashing import stream_key
from shards.partitions.events import Events
from shards.splitmix import UInt64Array, mix


def in_order(events: Events, item_keys: UInt64Array, seed: int) -> tuple[Events, int]:
    """Order by (user, time, seeded hash), and drop repeats of (user, item, time); returns also the number dropped.

    Breaking ties by item id or file order would plant a false order. Events that kept their row number (`--ties file`)
    are ordered by it instead of the hash. Of repeats, the one in the latest split and with the first row is kept.

    Args:
        item_keys: hash of each item, by code.
    """
    frame = events.frame[_by_user_and_time(events.frame)]
    user_E, time_E = frame["user"].to_numpy(), frame["time"].to_numpy()
    new_E = np.ones(frame.height, np.bool_)
    new_E[1:] = (user_E[1:] != user_E[:-1]) | (time_E[1:] != time_E[:-1])
    # Most events have a time of their own; the others alone are looked at further.
    tied_E = ~new_E
    tied_E[:-1] |= ~new_E[1:]
    place_E = np.cumsum(new_E)
    tied = frame.filter(tied_E)
    kept = _without_repeats(
        tied.with_columns(
            pl.Series("place", place_E[tied_E]), pl.Series("tie", _ties(tied, events.user_keys, item_keys, seed))
        )
    )
    alone = frame.filter(new_E & ~tied_E)
    merged = np.argsort(np.concatenate([place_E[~tied_E], kept["place"].to_numpy()]), kind="stable")
    frame = pl.concat([alone, kept.select(frame.columns)])[merged]
    return Events(frame, events.users, events.user_keys), tied.height - kept.height


def _by_user_and_time(frame: pl.DataFrame) -> npt.NDArray[np.int64]:
    """Indices of the events in the order of (user, time); in any order where both are equal."""
    time_E = frame["time"].to_numpy()
    if not len(time_E):
        return np.empty(0, np.int64)
    first, last = int(time_E.min()), int(time_E.max())
    bits = (last - first).bit_length()
    if bits + int(frame["user"].max() or 0).bit_length() > 64:  # type: ignore[arg-type]
        return frame.select(pl.arg_sort_by("user", "time")).to_series().to_numpy().astype(np.int64)
    # One number for both: sorting it takes a quarter of the time.
    user_E = frame["user"].to_numpy().astype(np.uint64)
    return np.argsort(user_E << np.uint64(bits) | (time_E - first).astype(np.uint64))


def _ties(tied: pl.DataFrame, user_keys: UInt64Array, item_keys: UInt64Array, seed: int) -> UInt64Array:
    tie = mix(user_keys[tied["user"].to_numpy()] ^ stream_key(seed, "ties"))
    tie = mix(tie + item_keys[tied["item"].to_numpy()])
    return mix(tie + tied["time"].to_numpy().astype(np.uint64))


def _without_repeats(tied: pl.DataFrame) -> pl.DataFrame:
    """Events at equal places in the order of their ties, each item once."""
    others = {"split": pl.col("split").max(), "row": pl.col("row").min()}
    kept = tied.group_by("place", "user", "item", "time", "tie").agg(
        [others[name] for name in tied.columns if name in others]
    )
    # The item comes last, for a total order even if two hashes collide.
    return kept.sort(["place", "row"] if "row" in tied.columns else ["place", "tie", "item"])
