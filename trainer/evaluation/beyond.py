"""Beyond accuracy: how varied, popular and new recommendations are, and how much they depend on order.

Measured on the ten best items of the catalog per user, whatever the targets are ranked among. Coverage, ARP and APLT
are defined as in WarpRec, MIUF as in RecTools; Jaccard as in Klenitskiy et al., *Does It Look Sequential?* (RecSys'24).

Letters: U users, K length of a list, N items of the catalog; a `1` is the entry of padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trainer.evaluation.ranking import Floats, Ints

LIST_LENGTH = 10
"""Items per list."""
LIST_METRICS = tuple(f"{name}@{LIST_LENGTH}" for name in ("ARP", "APLT", "MIUF"))
"""Mean training events per recommended item; share of recommendations in the long tail; mean of -log2 of the share of
users that have the item in training."""
COVERAGE = f"coverage@{LIST_LENGTH}"
"""Distinct recommended items divided by items of the catalog; a number of all users together, hence no interval."""
JACCARD = f"Jaccard@{LIST_LENGTH}"
"""Overlap of a user's lists for the original and the shuffled history, divided by their union."""
_HEAD = 0.8
"""Share of training events that the most popular items, the head, hold; all other items are the long tail."""


@dataclass(frozen=True)
class TrainingFacts:
    """What metrics beyond accuracy need to know of the training sequences (`training_facts`)."""

    event_1N: Ints
    """Training events per item id."""
    user_1N: Ints
    """Users that have the item in their training sequence, by item id."""
    users: int
    """Users with a training sequence."""
    later_share: float | None
    """Share of the training events that are later than the median test event; None if no user has a test item.

    With leave-one-out splits, training sees what was liked after most test events: an advantage that no system has once
    deployed (Ji et al., *A Critical Study on Data Leakage in Recommender System Offline Evaluation*, TOIS 2023).
    """

    @property
    def in_tail_1N(self) -> Ints:
        """1 for items of the long tail, by item id; the head is the fewest items that hold 80 % of the events."""
        order_N = np.argsort(-self.event_1N[1:], kind="stable")
        running_N = np.cumsum(self.event_1N[1:][order_N])
        before_N = running_N - self.event_1N[1:][order_N]
        in_tail_1N = np.zeros(len(self.event_1N), np.int64)
        in_tail_1N[1 + order_N] = before_N >= _HEAD * running_N[-1]
        return in_tail_1N


def list_metrics(top_UK: Ints, facts: TrainingFacts) -> dict[str, Floats]:
    """`LIST_METRICS` per user, (U,); means over the items of a list, whose padding does not count."""
    listed_UK = top_UK > 0
    # As in RecTools, an item without training events counts as if one user had it.
    novelty_1N = -np.log2(np.maximum(facts.user_1N, 1) / max(facts.users, 1))
    values = facts.event_1N, facts.in_tail_1N, novelty_1N
    length_U = np.maximum(listed_UK.sum(1), 1)
    return {
        name: np.where(listed_UK, value_1N[top_UK], 0.0).sum(1) / length_U
        for name, value_1N in zip(LIST_METRICS, values, strict=True)
    }


def coverage(top_UK: Ints, num_items: int) -> float:
    """`COVERAGE` of all users' lists."""
    seen_1N = np.zeros(num_items + 1, bool)
    seen_1N[top_UK] = True
    return float(seen_1N[1:].sum() / num_items)


def jaccard(first_UK: Ints, second_UK: Ints) -> Floats:
    """(U,) overlap of each user's two lists divided by their union; 1 for two empty lists.

    Args:
        first_UK: item ids, each at most once per list; 0 is padding. The other list may be of a different length.
    """
    overlap_U = ((first_UK[:, :, None] == second_UK[:, None, :]) & (first_UK > 0)[:, :, None]).sum((1, 2))
    union_U = (first_UK > 0).sum(1) + (second_UK > 0).sum(1) - overlap_U
    return np.where(union_U > 0, overlap_U / np.maximum(union_U, 1), 1.0)
