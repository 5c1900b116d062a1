"""Which items of a training sequence are targets, and which items are shown before each.

    last    the last item, as in LLM-SRec's official code
    window  every item but the first of a random window of `max_history` + 1 items, redrawn every epoch
    all     every item but the first (the paper's Appendix E.3)

Letters: U users, Y targets of all of them, E events, N items and padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from trainer.data.reading.counter_rng import IntArray, hash64
from trainer.data.reading.histories import Histories

TargetKind = Literal["last", "window", "all"]
Floats = npt.NDArray[np.float64]

_USER_BITS = 40  # bits of a target's address that hold the user index; its index among the user's targets is above


@dataclass(frozen=True)
class Targets:
    """Targets of a group of users, user by user, each in time order."""

    row_Y: IntArray
    """Row of the target's user in the group."""
    column_Y: IntArray
    """Index of the target among the targets of its user."""
    start_Y: IntArray
    """Index of the first event shown, in the user's sequence; the events shown end before the target."""
    end_Y: IntArray
    """Index of the target in the user's sequence."""
    vectors_Y: IntArray
    """How many of the events shown, the oldest ones, are bare item vectors without a title."""
    columns: int
    """The largest number of targets per user in the global batch: the same on every rank."""

    def __len__(self) -> int:
        return len(self.row_Y)

    def take(self, share: slice) -> Targets:
        """Targets of the users in rows `share`, which are then counted from 0."""
        kept = (self.row_Y >= share.start) & (self.row_Y < share.stop)
        row_Y = self.row_Y[kept] - share.start
        columns = (self.column_Y, self.start_Y, self.end_Y, self.vectors_Y)
        column_Y, start_Y, end_Y, vectors_Y = (column[kept] for column in columns)
        return Targets(row_Y, column_Y, start_Y, end_Y, vectors_Y, self.columns)

    def before(self, sequences: Histories, most: int | None = None) -> Histories:
        """For each target, the latest `most` events of its user before it; None: all."""
        kept_Y = self.end_Y if most is None else np.minimum(self.end_Y, most)
        return sequences.select(self.row_Y, sequences.offset_U1[self.row_Y] + self.end_Y - kept_Y, kept_Y)

    def shown(self, sequences: Histories) -> Histories:
        """For each target, the events that its prompt shows."""
        first = sequences.offset_U1[self.row_Y] + self.start_Y
        return sequences.select(self.row_Y, first, self.end_Y - self.start_Y)

    def items(self, sequences: Histories) -> IntArray:
        """Item ids of the targets, (Y,)."""
        item_Y: IntArray = sequences.item_E[sequences.offset_U1[self.row_Y] + self.end_Y]
        return item_Y

    def address_Y(self, sequences: Histories) -> IntArray:
        """Address of each target in random draws, (Y,), all distinct; a user's first target has the user index."""
        address_Y: IntArray = sequences.user_U[self.row_Y] + (self.column_Y << _USER_BITS)
        return address_Y


def choose_targets(
    sequences: Histories, kind: TargetKind, *, max_history: int, max_vector_items: int = 0, address: tuple[int, ...]
) -> Targets:
    """Choose the targets of a global batch, whose users have at least two events each.

    Args:
        max_history: most events shown with a title before a target.
        max_vector_items: most events shown as bare item vectors before those.
        address: what the choice of a window depends on besides the user, for example (seed, epoch).
    """
    length_U = sequences.length_U
    if kind == "window":
        width_U = np.minimum(length_U, max_history + 1)
        start_U = (hash64(*address, sequences.user_U) % (length_U - width_U + 1).astype(np.uint64)).astype(np.int64)
        first_U, count_U = start_U + 1, width_U - 1
    elif kind == "all":
        first_U, count_U = np.ones_like(length_U), length_U - 1
    else:
        first_U, count_U = length_U - 1, np.ones_like(length_U)
    row_Y = np.repeat(np.arange(len(sequences)), count_U)
    column_Y = np.arange(len(row_Y)) - np.repeat(np.cumsum(count_U) - count_U, count_U)
    end_Y = first_U[row_Y] + column_Y
    # All targets of a window are shown from the window's start, so that one branching prompt serves them.
    titled_Y = (first_U - 1)[row_Y] if kind == "window" else np.maximum(end_Y - max_history, 0)
    vectors_Y = np.minimum(titled_Y, max_vector_items)
    return Targets(row_Y, column_Y, titled_Y - vectors_Y, end_Y, vectors_Y, int(count_U.max(initial=1)))


def expected_targets(sequences: Histories, kind: TargetKind, *, max_history: int, num_items: int) -> Floats:
    """How often each item is expected to be a target in one epoch over these users, (N,); entry 0 is padding.

    Args:
        max_history: as in `choose_targets`.
    """
    length_U = sequences.length_U
    length_E = np.repeat(length_U, length_U)
    position_E = np.arange(len(sequences.item_E)) - np.repeat(sequences.offset_U1[:-1], length_U)
    if kind == "window":
        width_E = np.minimum(length_E, max_history + 1)
        starts_E = length_E - width_E + 1
        # Of all starts of a window, those whose window has the event, but not as its first one.
        first_E, last_E = np.maximum(position_E - width_E + 1, 0), np.minimum(position_E, starts_E) - 1
        chance_E = np.maximum(last_E - first_E + 1, 0) / starts_E
    elif kind == "all":
        chance_E = (position_E > 0).astype(np.float64)
    else:
        chance_E = (position_E == length_E - 1).astype(np.float64)
    return np.bincount(sequences.item_E, weights=chance_E, minlength=num_items + 1).astype(np.float64)
