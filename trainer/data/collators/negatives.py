"""Training negatives: uniform over the catalog, drawn by address, never a forbidden item.

Letters: B users, K negatives per user, N items and padding, E events, F distinct forbidden items of all users,
O positions still to be drawn.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.data.reading.counter_rng import IntArray, uniform_integers
from trainer.data.reading.histories import Histories

_MAX_ROUNDS = 200  # of rejection sampling; what is still open then is drawn by `_fill_exactly`
OFFICIAL_HISTORY = 128
"""Latest items before a target that the negatives of LLM-SRec's official code avoid: those that its SASRec reads."""
_MAX_BITMAP = 1 << 26
"""Bytes of the largest bitmap of users and items; above, forbidden items are looked up by binary search."""


def draw_negatives(
    forbidden: Histories, draws: int, *, num_items: int, distinct: bool, address: tuple[int, ...]
) -> IntArray:
    """Draw items outside each user's forbidden ones, (B, draws), by rejection sampling.

    Args:
        forbidden: one history per user; only its item ids count.
        distinct: no item occurs twice per user (candidates of one softmax); otherwise items may repeat (one negative
            per position).
        address: what the draws depend on besides the user, for example (seed, epoch).

    Raises:
        ValueError: a user has fewer allowed items than `draws` (`distinct`), or none.
    """
    rows = len(forbidden)
    excluded = _Excluded.of(forbidden, num_items)
    _check_supply(excluded.allowed_B, draws if distinct else min(draws, 1), num_items)
    negative_BK = np.zeros((rows, draws), np.int64)
    # Positions that are still to be drawn: all at first, then those whose last proposal was rejected.
    row_O, column_O = np.repeat(np.arange(rows), draws), np.tile(np.arange(draws), rows)
    for attempt in range(_MAX_ROUNDS):
        proposal_O = 1 + uniform_integers(num_items, *address, forbidden.user_U[row_O], column_O, attempt)
        negative_BK[row_O, column_O] = proposal_O
        rejected_O = excluded.contains(row_O, proposal_O)
        if distinct:
            row_O, column_O = _open_positions(negative_BK, row_O, column_O, rejected_O)
        else:
            row_O, column_O = row_O[rejected_O], column_O[rejected_O]
        if not len(row_O):
            return negative_BK
    open_BK = np.zeros((rows, draws), bool)
    open_BK[row_O, column_O] = True
    return _fill_exactly(negative_BK, open_BK, forbidden, num_items, distinct, address)


@dataclass(frozen=True)
class _Excluded:
    """Which items are forbidden to whom: a bitmap, or for large catalogs sorted (row, item) keys."""

    allowed_B: IntArray
    """Allowed items per user."""
    bitmap_BN: NDArray[np.bool_] | None
    key_F: IntArray
    """row * (N + 1) + item, ascending, and one key more; empty beside a bitmap."""
    num_items: int

    @classmethod
    def of(cls, forbidden: Histories, num_items: int) -> _Excluded:
        """The items of each history."""
        rows, width = len(forbidden), num_items + 1
        row_E = np.repeat(np.arange(rows), forbidden.length_U)
        if rows * width <= _MAX_BITMAP:
            bitmap_BN = np.zeros((rows, width), bool)
            bitmap_BN[row_E, forbidden.item_E] = True
            return cls(num_items - bitmap_BN.sum(1), bitmap_BN, np.zeros(0, np.int64), num_items)
        key_F = np.unique(row_E * width + forbidden.item_E)
        allowed_B = num_items - np.bincount(key_F // width, minlength=rows)
        # A key behind all others, so that every search ends inside the array.
        return cls(allowed_B, None, np.append(key_F, rows * width), num_items)

    def contains(self, row_O: IntArray, item_O: IntArray) -> NDArray[np.bool_]:
        """Whether each item is forbidden to the user of its row."""
        if self.bitmap_BN is not None:
            found_O: NDArray[np.bool_] = self.bitmap_BN[row_O, item_O]
        else:
            key_O = row_O * (self.num_items + 1) + item_O
            found_O = self.key_F[np.searchsorted(self.key_F, key_O)] == key_O
        return found_O


def _open_positions(
    negative_BK: IntArray, row_O: IntArray, column_O: IntArray, rejected_O: NDArray[np.bool_]
) -> tuple[IntArray, IntArray]:
    """Rows and columns to draw next where no item may repeat: the rejected ones, and repeats in the rows just drawn.

    An item may repeat one that an earlier round kept: the later column of the two is then drawn again.
    """
    open_BK = np.zeros(negative_BK.shape, bool)
    open_BK[row_O[rejected_O], column_O[rejected_O]] = True
    drawn = np.unique(row_O)
    open_BK[drawn] |= _repeats(negative_BK[drawn])
    found_O, at_O = np.nonzero(open_BK)
    return found_O, at_O


def _check_supply(allowed_B: IntArray, needed: int, num_items: int) -> None:
    """Raise unless each user has `needed` allowed items."""
    if len(allowed_B) and int(allowed_B.min()) < needed:
        raise ValueError(
            f"a user has only {int(allowed_B.min())} of {num_items} items left to draw {needed} negatives from: "
            "ask for fewer negatives (system.train_candidates or system.negatives)"
        )


def _repeats(item_BK: IntArray) -> np.ndarray:
    """True where the same item occurs earlier in the row."""
    # Stable: among equal items, the first one of the row stays first and is kept.
    order = np.argsort(item_BK, axis=1, kind="stable")
    ordered = np.take_along_axis(item_BK, order, axis=1)
    repeated = np.zeros(item_BK.shape, bool)
    repeated[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    result = np.zeros(item_BK.shape, bool)
    np.put_along_axis(result, order, repeated, axis=1)
    return result


def _fill_exactly(
    negative_BK: IntArray,
    open_BK: np.ndarray,
    forbidden: Histories,
    num_items: int,
    distinct: bool,
    address: tuple[int, ...],
) -> IntArray:
    """Fill the open entries in place by drawing from the list of remaining items instead of by rejection.

    Needed for users who own nearly the whole catalog. The last part of the address, `_MAX_ROUNDS`, follows that of the
    last rejection round, so no draw is used twice.
    """
    for row in np.flatnonzero(open_BK.any(axis=1)):
        own = forbidden.item_E[forbidden.offset_U1[row] : forbidden.offset_U1[row + 1]]
        taken = np.concatenate([own, negative_BK[row][~open_BK[row]]]) if distinct else own
        left = np.setdiff1d(np.arange(1, num_items + 1), taken)
        columns = np.flatnonzero(open_BK[row])
        user = int(forbidden.user_U[row])
        if distinct:
            order = np.argsort(uniform_integers(2**62, *address, user, left, _MAX_ROUNDS))
            negative_BK[row, columns] = left[order[: len(columns)]]
        else:
            negative_BK[row, columns] = left[uniform_integers(len(left), *address, user, columns, _MAX_ROUNDS)]
    return negative_BK
