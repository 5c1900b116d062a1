"""Drops events: those with bad times, repeats, of items without titles, and of users or items with too few. The others
are put in order."""

from functools import partial

import numpy as np
import numpy.typing as npt
import polars as pl

from shards.hashing import hash_strings, stream_key
from shards.manifest import DatasetError
from shards.partitions.engine import Parts
from shards.partitions.events import Events, Tally
from shards.partitions.order import in_order
from shards.readers.times import check_plausible
from shards.sequences import Filters
from shards.splitmix import UInt64Array


class Cleaned:
    """Counts that the cleaning finds, in one part or in all of them."""

    def __init__(self, num_items: int) -> None:
        self.read, self.clean = Tally(num_items), Tally(num_items)
        """Counts before and after."""
        self.bad_times = 0
        """Events without a time, or at a time of zero or below."""
        self.bad_example: tuple[str, str, int] | None = None
        """User, item and time of one of them."""
        self.duplicates = 0
        self.span: list[int] = []
        """Times of events that are first or last in a part, in ms."""

    def add(self, other: "Cleaned") -> None:
        """Add what was found in another part."""
        self.read.add(other.read)
        self.clean.add(other.clean)
        self.bad_times += other.bad_times
        # The smallest, so that the order of the input does not matter.
        self.bad_example = min(filter(None, (self.bad_example, other.bad_example)), default=None)
        self.duplicates += other.duplicates
        self.span += other.span


def cleaned(parts: Parts[Events], items: pl.Series, seed: int) -> tuple[Parts[Events], Cleaned]:
    """The events in order, without bad times and repeats.

    Args:
        items: raw ids by item code.
    """
    found = Cleaned(len(items))
    item_keys = hash_strings(items, stream_key(seed, "items"))
    clean = partial(_cleaned_part, items=items, item_keys=item_keys, seed=seed)
    return parts.map(clean, "ordering", found.add), found


def _cleaned_part(events: Events, items: pl.Series, item_keys: UInt64Array, seed: int) -> tuple[Events, Cleaned]:
    found = Cleaned(len(items))
    frame = events.frame
    found.read = Tally.of(frame, len(items))
    good_E = frame["time"].to_numpy() > 0
    if not good_E.all():
        bad = frame.filter(~good_E)
        found.bad_times = bad.height
        named = bad.select(events.users.gather(bad["user"]), items.gather(bad["item"]), "time")
        found.bad_example = named.sort(named.columns).row(0)
        frame = frame.filter(good_E)
    if frame.height:
        time_E = frame["time"].to_numpy()
        found.span = [int(time_E.min()), int(time_E.max())]
    ordered, found.duplicates = in_order(Events(frame, events.users, events.user_keys), item_keys, seed)
    found.clean = Tally.of(ordered.frame, len(items))
    return ordered, found


def check_times(found: Cleaned, policy: str, unit: str | None) -> None:
    """Check the times of all events.

    Args:
        policy: `drop` events with bad times, or `error`.
        unit: the unit that the user named, if any.

    Raises:
        DatasetError: there are bad times and `policy` is `error` (the message has an example), or the times are not
            plausible.
    """
    if found.bad_example is not None and policy == "error":
        user, item, time = found.bad_example
        raise DatasetError(
            f"{found.bad_times:,} events have a missing, zero or negative time, such as user {user!r} with item "
            f"{item!r} at {time}: drop them with --bad-times drop"
        )
    check_plausible(pl.Series(np.array(found.span, np.int64)), unit)


def only_items(parts: Parts[Events], kept_N: npt.NDArray[np.bool_]) -> tuple[Parts[Events], Tally]:
    """The events of some of the items, and their counts."""
    tally = Tally(len(kept_N))
    return parts.map(partial(_of_items, kept_N=kept_N), "items with titles", tally.add), tally


def _of_items(events: Events, kept_N: npt.NDArray[np.bool_]) -> tuple[Events, Tally]:
    frame = events.frame.filter(kept_N[events.frame["item"].to_numpy()])
    return Events(frame, events.users, events.user_keys), Tally.of(frame, len(kept_N))


def k_core(parts: Parts[Events], before: Tally, filters: Filters) -> tuple[Parts[Events], Tally]:
    """Apply the filter, in a single pass or iterated to the fixed point; returns also the counts of what is left.

    Args:
        before: the counts of all parts.
    """
    while True:
        enough_N = before.item_count_N >= filters.min_item
        after = Tally(len(enough_N))
        kept = partial(_kept, enough_N=enough_N, min_user=filters.min_user)
        parts = parts.map(kept, "k-core filter", after.add)
        if not filters.iterate or after.interactions == before.interactions:
            return parts, after
        before = after


def _kept(events: Events, enough_N: npt.NDArray[np.bool_], min_user: int) -> tuple[Events, Tally]:
    """Events of users and items that have enough of them."""
    user_E, item_E = events.frame["user"].to_numpy(), events.frame["item"].to_numpy()
    frame = events.frame.filter(enough_N[item_E] & (np.bincount(user_E) >= min_user)[user_E])
    return Events(frame, events.users, events.user_keys), Tally.of(frame, len(enough_N))
