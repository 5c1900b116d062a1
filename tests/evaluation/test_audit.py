"""The order audit on arrays made by hand, and its groups against the paper's definitions."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from data_helpers import ints, of_items

from trainer.evaluation.order.audit import AuditInput, ListAnswers, VectorAnswers, Vectors, audit
from trainer.evaluation.order.groups import adjacent_pairs, count_keys, transition_scores, upper_half, warm_and_cold

ITEMS = np.eye(12, dtype=np.float32)
"""Item j has its own axis, so that a user's vector holds the score of each item."""


def scores(*best: int) -> Vectors:
    """A user's vector that ranks these items first."""
    vector = np.zeros(12, np.float32)
    for place, item in enumerate(best):
        vector[item - 1] = 12 - place
    return vector


def lists_of_ten(first: int) -> list[int]:
    return list(range(first, first + 10))


def test_changes_by_hand() -> None:
    # Targets rank first and second on original histories, second and third on shuffled ones.
    original = VectorAnswers(np.stack([scores(1, 2), scores(3, 4)]), ITEMS)
    shuffled = VectorAnswers(np.stack([scores(2, 1), scores(5, 3, 4)]), ITEMS)
    found = audit(AuditInput("hand", 12, ints([1, 4]), original, shuffled))
    ndcg, hits = found.inference
    assert (ndcg.metric, ndcg.group, ndcg.users) == ("NDCG@10", "all users", 2)
    second, third = 1 / np.log2(3), 1 / 2
    assert ndcg.before.value == pytest.approx((1 + second) / 2, abs=1e-9)
    assert ndcg.after.value == pytest.approx((second + third) / 2, abs=1e-9)
    assert ndcg.relative is not None
    assert ndcg.relative.value == pytest.approx((second + third) / (1 + second) - 1, abs=1e-9)
    # Each resample is a user twice, or both.
    assert ndcg.relative.low == pytest.approx(second - 1, abs=1e-9)
    assert ndcg.relative.high == pytest.approx(third / second - 1, abs=1e-9)
    assert (hits.before.value, hits.after.value) == (1.0, 1.0)
    assert found.training == ()
    # Cosines (12 * 11 + 11 * 12) / 265, and (12 * 11 + 11 * 10) / sqrt(265 * 365).
    assert found.similarity is not None
    assert found.similarity.value == pytest.approx((264 / 265 + 242 / np.sqrt(265 * 365)) / 2, abs=1e-6)
    assert found.similarity_of_others is not None
    assert found.similarity_of_others.value == pytest.approx(0.0)


def test_a_metric_of_zero_has_no_relative_change() -> None:
    misses = ListAnswers(np.array([list(range(2, 12))]))
    [ndcg, _] = audit(AuditInput("none", 12, ints([1]), misses, misses)).inference
    assert (ndcg.before.value, ndcg.relative) == (0.0, None)


def test_seen_items_are_neither_ranked_nor_listed() -> None:
    vectors = VectorAnswers(np.stack([scores(1, 2), scores(3, 4)]), ITEMS)
    given = AuditInput("seen", 12, ints([2, 4]), vectors, vectors)
    assert audit(given).inference[0].before.value == pytest.approx(1 / np.log2(3))
    assert audit(replace(given, seen=[ints([1]), ints([3])])).inference[0].before.value == 1.0


def test_lists_and_vectors_agree() -> None:
    rng = np.random.default_rng(0)
    target_U = rng.integers(1, 41, 60)
    items = rng.normal(size=(40, 8)).astype(np.float32)
    users = [rng.normal(size=(60, 8)).astype(np.float32) for _ in range(3)]
    vectors = [VectorAnswers(user_UD, items) for user_UD in users]
    lists = [ListAnswers(np.argsort(-(user_UD @ items.T), axis=1)[:, :15] + 1) for user_UD in users]
    by_vector = audit(AuditInput("v", 40, target_U, vectors[0], vectors[1], vectors[2]))
    by_list = audit(AuditInput("l", 40, target_U, lists[0], lists[1], lists[2]))
    assert by_vector.inference == by_list.inference
    assert by_vector.training == by_list.training != ()
    assert by_vector.jaccard == by_list.jaccard
    assert by_list.similarity is None


def test_a_model_that_ignores_order_does_not_change() -> None:
    vectors = VectorAnswers(np.stack([scores(1, 2), scores(3, 4)]), ITEMS)
    found = audit(AuditInput("bag", 12, ints([2, 4]), vectors, vectors))
    assert found.jaccard.value == 1.0
    assert all(change.relative is not None and change.relative.value == 0.0 for change in found.inference)
    assert found.similarity is not None
    assert found.similarity.value == pytest.approx(1.0)


def test_groups_divide_the_users() -> None:
    lists = ListAnswers(np.array([lists_of_ten(1), lists_of_ten(2), lists_of_ten(3), lists_of_ten(1)]))
    given = AuditInput("groups", 12, ints([1, 2, 12, 12]), lists, lists)
    given = replace(given, transition_score_U=np.array([3.0, 0.0, 1.0, 9.0]), event_N=np.arange(12, 0, -1))
    found = audit(given)
    assert {c.group: c.users for c in found.inference} == {
        "all users": 4,
        "frequent transitions": 2,
        "rare transitions": 2,
        "warm targets": 2,
        "cold targets": 2,
    }
    rate = {c.group: c.before.value for c in found.inference if c.metric == "HR@10"}
    assert rate["warm targets"] == 1.0
    assert rate["cold targets"] == 0.5


def test_transition_scores_equal_the_papers_formula() -> None:
    train = [[1, 2, 3, 2, 3], [2, 3, 1], [4]]
    histories = of_items([1, 2, 3], [3, 1, 2, 3], [4], [5, 5])
    count = Counter(pair for items in train for pair in pairwise(items))
    of_train = of_items(*train)
    row_P, key_P = adjacent_pairs(histories.item_E, histories.offset_U1, 5)
    _, among = adjacent_pairs(of_train.item_E, of_train.offset_U1, 5)
    found = transition_scores(row_P, count_keys(key_P, among), len(histories))
    lists = ([1, 2, 3], [3, 1, 2, 3], [4], [5, 5])
    expected = [sum(count[p] for p in pairwise(items)) / max(len(items) - 1, 1) for items in lists]
    assert found.tolist() == expected == [2.0, 5 / 3, 0.0, 0.0]
    assert upper_half(found).tolist() == [True, True, False, False]
    assert upper_half(np.array([1.0, 1.0, 1.0])).tolist() == [True, True, False], "ties by row; the larger half"


def test_warm_and_cold_are_35_percent_each() -> None:
    warm_N, cold_N = warm_and_cold(ints([5, 1, 1, 9, 3, 0]))
    assert warm_N.nonzero()[0].tolist() == [0, 3]
    assert cold_N.nonzero()[0].tolist() == [2, 5], "of equal counts the higher id is colder"
