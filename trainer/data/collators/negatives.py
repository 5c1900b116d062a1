"""Training negatives: uniform over the catalog, drawn by address, never a forbidden item.

Letters: B users, K negatives per user, E events, F distinct forbidden items of all users.
"""

from __future__ import annotations

import numpy as np

from trainer.data.reading.counter_rng import IntArray, uniform_integers
from trainer.data.reading.histories import Histories

_MAX_ROUNDS = 200  # of rejection sampling; what is still open then is drawn by `_fill_exactly`


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
    row_E = np.repeat(np.arange(rows), forbidden.length_U)
    # (row, item) as one integer, so that one np.isin tests the items of all users.
    forbidden_key = np.unique(row_E * (num_items + 1) + forbidden.item_E)
    _check_supply(forbidden_key // (num_items + 1), rows, draws if distinct else min(draws, 1), num_items)
    user_B1 = forbidden.user_U[:, None]
    draw_K = np.arange(draws)[None, :]
    negative_BK = np.zeros((rows, draws), np.int64)
    open_BK = np.ones((rows, draws), bool)
    for attempt in range(_MAX_ROUNDS):
        proposal_BK = 1 + uniform_integers(num_items, *address, user_B1, draw_K, attempt)
        negative_BK = np.where(open_BK, proposal_BK, negative_BK)
        key_BK = np.arange(rows)[:, None] * (num_items + 1) + negative_BK
        open_BK = np.isin(key_BK, forbidden_key)
        if distinct:
            open_BK |= _repeats(negative_BK)
        if not open_BK.any():
            return negative_BK
    return _fill_exactly(negative_BK, open_BK, forbidden, num_items, distinct, address)


def _check_supply(row_F: IntArray, rows: int, needed: int, num_items: int) -> None:
    """Raise unless each user has `needed` allowed items; `row_F` is the row of each forbidden (row, item) pair."""
    allowed = num_items - np.bincount(row_F, minlength=rows)
    if rows and int(allowed.min()) < needed:
        raise ValueError(
            f"a user has only {int(allowed.min())} of {num_items} items left to draw {needed} negatives from: "
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
