"""Groups of users by their sequences and by their targets (KDD'25, Figures 3 and 4).

Letters: U users, E events of all users end to end, N items of the catalog and padding.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from trainer.config import Split
from trainer.data.reading.counter_rng import IntArray
from trainer.data.reading.dataset import Dataset
from trainer.data.reading.histories import Histories, Users
from trainer.data.reading.shards import read_in_order
from trainer.evaluation.ranking import Floats

WARM, COLD = "warm", "cold"
TRANSITION, NON_TRANSITION = "Transition", "Non-Transition"
WARM_SHARE = 0.35
"""Share of the items that are warm, and that are cold (A-LLMRec, which the paper follows)."""


def transition_scores(train: Histories, num_items: int) -> Floats:
    """(U,) the mean, over the pairs of adjacent items of a user, of how often the ordered pair occurs in all sequences.

    Over all users' sequences, since within one user nearly every pair occurs once. 0 for a user of one item.
    """
    row_E = np.repeat(np.arange(len(train)), train.length_U)
    adjacent_E = row_E[1:] == row_E[:-1]
    pair = (train.item_E[:-1] * (num_items + 1) + train.item_E[1:])[adjacent_E]
    _, inverse, count = np.unique(pair, return_inverse=True, return_counts=True)
    total_U = np.bincount(row_E[1:][adjacent_E], weights=count[inverse].astype(np.float64), minlength=len(train))
    mean_U: Floats = total_U / np.maximum(train.length_U - 1, 1)
    return mean_U


def transition_groups(dataset: Dataset, split: Split) -> Mapping[str, IntArray]:
    """Indices of the users of a split whose transition score is in the upper half, and of the others.

    Ties of the score are broken by user index.

    Raises:
        ValueError: fewer than two users have a target in the split.
    """
    users = _all(dataset)
    histories, _ = users.targets(split)
    evaluated_U = histories.user_U
    if len(evaluated_U) < 2:
        raise ValueError(
            f"{dataset.path} has {len(evaluated_U)} {split} user(s), too few for two groups: build it with more"
        )
    score_U = transition_scores(users.train, dataset.num_items)[np.searchsorted(users.train.user_U, evaluated_U)]
    ranked_U = evaluated_U[np.argsort(-score_U, kind="stable")]
    half = len(ranked_U) // 2
    return {TRANSITION: np.sort(ranked_U[:half]), NON_TRANSITION: np.sort(ranked_U[half:])}


def popularity_groups(dataset: Dataset, split: Split, share: float = WARM_SHARE) -> Mapping[str, IntArray]:
    """Indices of the users of a split whose target is warm, and of those whose target is cold.

    Items are ordered by their number of training events, ties by item id; the first `share` of all items are warm, the
    last `share` cold.

    Raises:
        ValueError: no user of the split has a warm target, or none a cold one.
    """
    users = _all(dataset)
    histories, target_U = users.targets(split)
    count_N = np.bincount(users.train.item_E, minlength=dataset.num_items + 1)[1:]
    order_N = np.argsort(-count_N, kind="stable") + 1
    size = int(share * dataset.num_items)
    groups = {
        WARM: histories.user_U[np.isin(target_U, order_N[:size])],
        COLD: histories.user_U[np.isin(target_U, order_N[dataset.num_items - size :])],
    }
    if empty := [name for name, user_U in groups.items() if not len(user_U)]:
        raise ValueError(
            f"no {split} user of {dataset.path} has a {empty[0]} target (one of {size} of {dataset.num_items} items): "
            "use a larger dataset, or one that was built with a lower --min-item"
        )
    return groups


def _all(dataset: Dataset) -> Users:
    return Users.concatenate(list(read_in_order(dataset.path, dataset.manifest)))
