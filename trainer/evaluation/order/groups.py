"""Groups of users and items in which order, or text, should matter more than in others; on plain arrays.

Letters: U users, E events of all users joined end to end, P pairs of adjacent events, N items.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from trainer.evaluation.ranking import Floats, Ints

WARM_SHARE = 0.35
"""Share of the items that are warm, and of those that are cold (A-LLMRec, §4.3; LLM-SRec, Fig. 4)."""

Mask = npt.NDArray[np.bool_]


def adjacent_pairs(item_E: Ints, offset_U1: Ints, num_items: int) -> tuple[Ints, Ints]:
    """User row (P,) and key (P,) of each pair of adjacent items in the histories; equal pairs have equal keys."""
    row_E = np.repeat(np.arange(len(offset_U1) - 1), np.diff(offset_U1))
    start_P = np.flatnonzero(row_E[1:] == row_E[:-1])
    return row_E[start_P], item_E[start_P] * (num_items + 1) + item_E[start_P + 1]


def count_keys(key_P: Ints, among: Ints) -> Ints:
    """How often each key occurs in `among`, (P,)."""
    known, count = np.unique(among, return_counts=True)
    if not len(known):
        return np.zeros(len(key_P), np.int64)
    place_P = np.minimum(np.searchsorted(known, key_P), len(known) - 1)
    found: Ints = np.where(known[place_P] == key_P, count[place_P], 0).astype(np.int64)
    return found


def transition_scores(row_P: Ints, count_P: Ints, num_users: int) -> Floats:
    """(U,) mean number of times that a user's transitions occur in all training sequences (LLM-SRec, Fig. 3).

    t-score_u = sum over t of Count(i_t -> i_t+1) / (n_u - 1); 0 for users with fewer than two items.

    Args:
        row_P: user of each pair (`adjacent_pairs`).
        count_P: how often the pair occurs in training.
    """
    pairs_U = np.bincount(row_P, minlength=num_users)
    return np.bincount(row_P, weights=count_P, minlength=num_users) / np.maximum(pairs_U, 1)


def upper_half(score_U: Floats) -> Mask:
    """Whether a user is among the half with the higher scores, the larger half if they are odd; ties by row."""
    chosen_U = np.zeros(len(score_U), bool)
    chosen_U[np.argsort(-score_U, kind="stable")[: -(-len(score_U) // 2)]] = True
    return chosen_U


def warm_and_cold(event_N: Ints, share: float = WARM_SHARE) -> tuple[Mask, Mask]:
    """Whether each item is in the `share` with the most, and in that with the fewest training events; ties by id."""
    order_N = np.argsort(-event_N, kind="stable")
    size = int(share * len(event_N))
    warm_N, cold_N = np.zeros((2, len(event_N)), bool)
    warm_N[order_N[:size]] = True
    cold_N[order_N[len(event_N) - size :]] = True
    return warm_N, cold_N
