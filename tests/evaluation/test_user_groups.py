"""Transition scores and groups on sequences worked out by hand, and on the synthetic world."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from data_helpers import histories

from trainer.data.reading.dataset import open_dataset
from trainer.data.reading.histories import Users
from trainer.data.reading.shards import read_in_order
from trainer.evaluation.order.user_groups import popularity_groups, transition_groups, transition_scores


def test_transition_scores_by_hand() -> None:
    """1→2 occurs three times in all sequences, 2→1 and 2→3 once each; the order of a pair counts."""
    sequences = [[1, 2, 3], [1, 2, 1, 2], [4], [3, 1]]
    train = histories([[(item, 0) for item in items] for items in sequences])
    assert transition_scores(train, train, num_items=4).tolist() == pytest.approx(
        [(3 + 1) / 2, (3 + 1 + 3) / 3, 0.0, 1.0]
    )


def test_half_of_the_users_by_score(world: Path) -> None:
    dataset = open_dataset(world, full_check=False)
    users = Users.concatenate(list(read_in_order(world, dataset.manifest)))
    groups = transition_groups(dataset, "test")
    upper, lower = groups["Transition"], groups["Non-Transition"]
    score_U = transition_scores(users.train, users.train, dataset.num_items)
    assert score_U[upper].min() >= score_U[lower].max()
    assert (len(upper), len(lower)) == (31, 30)
    assert sorted([*upper, *lower]) == np.flatnonzero(users.test_item_U).tolist()


def test_warm_and_cold_targets(world: Path) -> None:
    """14 of 40 items are warm and 14 cold, by their training events; other targets are in neither group."""
    dataset = open_dataset(world, full_check=False)
    users = Users.concatenate(list(read_in_order(world, dataset.manifest)))
    count_N = np.bincount(users.train.item_E, minlength=41)
    ranked = sorted(range(1, 41), key=lambda item: (-count_N[item], item))
    groups = popularity_groups(dataset, "test")
    for name, items in {"warm": ranked[:14], "cold": ranked[-14:]}.items():
        expected = [user for user, target in enumerate(users.test_item_U) if target in items]
        assert groups[name].tolist() == expected
        assert expected
    with pytest.raises(ValueError, match=r"no test user of .* has a warm target \(one of 0 of 40 items\)"):
        popularity_groups(dataset, "test", share=0.01)
