"""The k-core filter over all parts: counts of items are those of all users."""

from functools import partial

import numpy as np
import numpy.typing as npt

from shards.partitions.events import Events, Tally
from shards.partitions.parts import Parts
from shards.sequences import Filters


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
