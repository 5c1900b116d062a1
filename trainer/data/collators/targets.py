"""Which items of a training sequence a step learns to predict, and what is shown before each.

    last    the last one, as in LLM-SRec's official code
    window  all of one stretch of `max_history` + 1 items, another one each epoch
    all     every item but the first (the paper's Appendix E.3)

Letters: U users, T targets of all of them, E events.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from trainer.data.reading.counter_rng import IntArray, hash64
from trainer.data.reading.histories import Histories

TargetKind = Literal["last", "window", "all"]

_USER_BITS = 40  # above them a row's address carries which of the user's targets it is


@dataclass(frozen=True)
class Targets:
    """Targets of some users, user after user, in the order of time."""

    row_Y: IntArray
    """The user's place among the users."""
    column_Y: IntArray
    """The target's place among the user's."""
    start_Y: IntArray
    """The first event shown; the events shown end before the target."""
    end_Y: IntArray
    """The target's place in the sequence."""
    columns: int
    """The most targets that a user of the batch has: the same on every rank."""

    def __len__(self) -> int:
        return len(self.row_Y)

    def take(self, share: slice) -> Targets:
        """Those of a stretch of the users."""
        kept = (self.row_Y >= share.start) & (self.row_Y < share.stop)
        return Targets(
            self.row_Y[kept] - share.start, self.column_Y[kept], self.start_Y[kept], self.end_Y[kept], self.columns
        )

    def before(self, sequences: Histories) -> Histories:
        """For each target, all that its user did before."""
        first = sequences.offset_U1[self.row_Y]
        return sequences.select(self.row_Y, first, self.end_Y)

    def shown(self, sequences: Histories) -> Histories:
        """For each target, what a prompt shows of it."""
        first = sequences.offset_U1[self.row_Y] + self.start_Y
        return sequences.select(self.row_Y, first, self.end_Y - self.start_Y)

    def items(self, sequences: Histories) -> IntArray:
        """The targets themselves, (T,)."""
        item_Y: IntArray = sequences.item_E[sequences.offset_U1[self.row_Y] + self.end_Y]
        return item_Y

    def address_Y(self, sequences: Histories) -> IntArray:
        """What tells the targets apart where randomness is drawn; a user's first has the user's number."""
        address_Y: IntArray = sequences.user_U[self.row_Y] + (self.column_Y << _USER_BITS)
        return address_Y


def choose_targets(sequences: Histories, kind: TargetKind, *, max_history: int, address: tuple[int, ...]) -> Targets:
    """Targets of the users of a global batch; each has at least two events.

    Args:
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
    start_Y = (first_U - 1)[row_Y] if kind == "window" else np.maximum(end_Y - max_history, 0)
    return Targets(row_Y, column_Y, start_Y, end_Y, int(count_U.max(initial=1)))
