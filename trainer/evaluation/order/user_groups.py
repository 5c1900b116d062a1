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
from trainer.evaluation.order import groups
from trainer.evaluation.ranking import Floats

WARM, COLD = "warm", "cold"
TRANSITION, NON_TRANSITION = "Transition", "Non-Transition"


def transition_scores(sequences: Histories, train: Histories, num_items: int) -> Floats:
    """(U,) transition scores of some sequences over all training sequences; within one user nearly every pair occurs
    once."""
    _, known = groups.adjacent_pairs(train.item_E, train.offset_U1, num_items)
    row_P, key_P = groups.adjacent_pairs(sequences.item_E, sequences.offset_U1, num_items)
    return groups.transition_scores(row_P, groups.count_keys(key_P, known), len(sequences))


def transition_groups(dataset: Dataset, split: Split) -> Mapping[str, IntArray]:
    """Indices of the users of a split whose transition score is in the upper half, and of the others.

    Ties of the score are broken by user index.

    Raises:
        ValueError: fewer than two users have a target in the split.
    """
    users = _all(dataset)
    histories, _ = users.targets(split)
    evaluated_U = np.unique(histories.user_U)
    if len(evaluated_U) < 2:
        raise ValueError(
            f"{dataset.path} has {len(evaluated_U)} {split} user(s), too few for two groups: build it with more"
        )
    sequences = users.sequences().take(np.searchsorted(users.train.user_U, evaluated_U))
    score_U = transition_scores(sequences, users.train, dataset.num_items)
    upper_U = groups.upper_half(score_U)
    return {TRANSITION: evaluated_U[upper_U], NON_TRANSITION: evaluated_U[~upper_U]}


def popularity_groups(dataset: Dataset, split: Split, share: float = groups.WARM_SHARE) -> Mapping[str, IntArray]:
    """Indices of the users of a split whose target is warm, and of those whose target is cold.

    Raises:
        ValueError: no user of the split has a warm target, or none a cold one, or users have several.
    """
    if split == "test" and dataset.manifest.successive_after is not None:
        raise ValueError(f"a user of {dataset.path} has warm and cold targets: build it with another --target")
    users = _all(dataset)
    histories, target_U = users.targets(split)
    count_N = np.bincount(users.train.item_E, minlength=dataset.num_items + 1)[1:]
    warm_N, cold_N = groups.warm_and_cold(count_N, share)
    found = {WARM: histories.user_U[warm_N[target_U - 1]], COLD: histories.user_U[cold_N[target_U - 1]]}
    if empty := [name for name, user_U in found.items() if not len(user_U)]:
        raise ValueError(
            f"no {split} user of {dataset.path} has a {empty[0]} target (one of {warm_N.sum()} of {dataset.num_items} "
            "items): use a larger dataset, or one that was built with a lower --min-item"
        )
    return found


def _all(dataset: Dataset) -> Users:
    return Users.concatenate(list(read_in_order(dataset.path, dataset.manifest)))
