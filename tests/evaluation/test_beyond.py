"""Metrics beyond accuracy, and lists of the whole catalog, against their definitions on lists made by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import ints
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.reading.dataset import open_dataset
from trainer.data.reading.shards import read_in_order
from trainer.evaluation.beyond import TrainingFacts, coverage, jaccard, list_metrics
from trainer.evaluation.catalog import Catalog
from trainer.evaluation.ranking import Ranks, metrics_per_target
from trainer.evaluation.training_facts import training_facts

# Items 1 to 5 have 5, 3, 1, 1 and 0 of 10 training events: items 1 and 2 hold 80 %, so 3, 4 and 5 are the tail.
FACTS = TrainingFacts(ints([0, 5, 3, 1, 1, 0]), ints([0, 4, 2, 1, 1, 0]), users=4, later_share=None)
LISTS = np.array([[1, 2], [3, 5], [4, 0]])


def test_popularity_tail_and_novelty_by_hand() -> None:
    found = list_metrics(LISTS, FACTS)
    np.testing.assert_allclose(found["ARP@10"], [4.0, 0.5, 1.0], atol=1e-12)
    np.testing.assert_allclose(found["APLT@10"], [0.0, 1.0, 1.0], atol=1e-12)
    # -log2 of 4/4 and 2/4; of 1/4 and, for an item that nobody has, 1/4 too; of 1/4 alone.
    np.testing.assert_allclose(found["MIUF@10"], [0.5, 2.0, 2.0], atol=1e-12)


def test_novelty_equals_the_example_of_rectools() -> None:
    # Docstring of rectools.metrics.MeanInvUserFreq: user 1 has items 1 and 2, users 2 and 3 have item 1.
    facts = TrainingFacts(ints([0, 3, 1, 0]), ints([0, 3, 1, 0]), users=3, later_share=None)
    found = list_metrics(np.array([[3, 0], [2, 3], [1, 2]]), facts)["MIUF@10"]
    np.testing.assert_allclose(found, [1.5849625, 1.5849625, 0.79248125], atol=1e-8)


def test_the_head_is_the_fewest_items_that_hold_80_percent() -> None:
    assert FACTS.in_tail_1N.tolist() == [0, 0, 0, 1, 1, 1]
    # 7 of 10 do not reach 80 %, so the next item belongs to the head as well; equal counts in order of ids.
    assert replace(FACTS, event_1N=ints([0, 1, 7, 1, 1])).in_tail_1N.tolist() == [0, 0, 0, 1, 1]


def test_coverage_counts_each_item_once_and_no_padding() -> None:
    assert coverage(LISTS, 5) == 1.0
    assert coverage(np.array([[1, 2], [2, 1], [0, 0]]), 8) == 0.25


def test_jaccard_by_hand() -> None:
    first = np.array([[1, 2, 3], [1, 2, 3], [1, 0, 0], [0, 0, 0]])
    second = np.array([[3, 2, 1], [3, 4, 5], [2, 1, 0], [0, 0, 0]])
    assert jaccard(first, second).tolist() == [1.0, 0.2, 0.5, 1.0]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_lists_equal_a_sort_of_all_scores_for_any_chunk(data: st.DataObject) -> None:
    num_users, num_items, length = (data.draw(st.integers(1, most)) for most in (5, 12, 14))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    user_BD = torch.randint(-2, 3, (num_users, 2), generator=generator).float()  # scores often tie
    item_ND = torch.randint(-2, 3, (num_items, 2), generator=generator).float()
    excluded = st.lists(st.integers(0, num_items), max_size=12)
    exclude = data.draw(st.lists(excluded, min_size=num_users, max_size=num_users))
    expected = np.zeros((num_users, length), np.int64)
    for user in range(num_users):
        left = [item for item in range(1, num_items + 1) if item not in exclude[user]]
        best = sorted(left, key=lambda item: (-float(user_BD[user] @ item_ND[item - 1]), item))[:length]
        expected[user, : len(best)] = best
    catalog, chunk = Catalog.of(item_ND), data.draw(st.integers(1, 40))
    np.testing.assert_array_equal(catalog.top(user_BD, exclude, length, chunk), expected)
    # Beside ranks, whose target may be excluded, the list is the same.
    target_B = torch.ones(num_users, dtype=torch.int64)
    np.testing.assert_array_equal(catalog.rank(user_BD, target_B, exclude, length, chunk).top_BK, expected)


def test_accuracy_equals_the_oracle_on_lists_made_by_hand() -> None:
    import ir_measures
    from ir_measures import RR, R, nDCG

    top_UK = np.array([[4, 2, 9, 7], [1, 3, 5, 6], [8, 9, 2, 1]])
    target_U = [9, 1, 4]  # third, first, not listed
    run = [
        ir_measures.ScoredDoc(str(u), str(item), -float(place))
        for u, row in enumerate(top_UK.tolist())
        for place, item in enumerate(row)
    ]
    qrels = [ir_measures.Qrel(str(u), str(item), 1) for u, item in enumerate(target_U)]
    ours = metrics_per_target(Ranks(ints([2, 0, 9]), ints([0, 0, 0]), ints([10, 10, 10])))
    for name, measure in {"HR@5": R @ 5, "HR@1": R @ 1, "NDCG@5": nDCG @ 5, "NDCG@1": nDCG @ 1}.items():
        assert math.isclose(ours[name].mean(), ir_measures.calc_aggregate([measure], qrels, run)[measure], abs_tol=1e-9)
    listed = ours["MRR"].copy()
    listed[2] = 0.0  # the oracle sees no rank behind the list
    assert math.isclose(listed.mean(), ir_measures.calc_aggregate([RR], qrels, run)[RR], abs_tol=1e-9)


def test_training_facts_equal_a_count_by_hand(world: Path) -> None:
    dataset = open_dataset(world, full_check=False)
    users = next(read_in_order(world, dataset.manifest))
    facts = training_facts(dataset)
    bounds = list(zip(users.train.offset_U1[:-1], users.train.offset_U1[1:], strict=True))
    for item in (1, 7, dataset.num_items):
        rows = [users.train.item_E[a:b].tolist() for a, b in bounds]
        assert facts.event_1N[item] == sum(row.count(item) for row in rows)
        assert facts.user_1N[item] == sum(item in row for row in rows)
    median = np.median(users.test_time_U)
    assert facts.users == 61
    share = float((users.train.time_E > median).mean())
    assert 0 < share < 1
    assert facts.later_share == pytest.approx(share)
