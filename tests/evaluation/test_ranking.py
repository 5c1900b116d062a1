"""Ranks and metrics against brute force, hand computations and ir_measures.

Letters: B and U users, C candidates, D dimensions, N items.
"""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import ir_measures
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainer.evaluation import ranking
from trainer.evaluation.catalog import rank_catalog
from trainer.evaluation.ranking import (
    METRIC_NAMES,
    Estimate,
    Ranks,
    bootstrap,
    bootstrap_all,
    chance,
    concatenate,
    metrics_per_target,
    rank_candidates,
)


def ranks_of(greater: list[int], ties: list[int], candidates: list[int]) -> Ranks:
    return Ranks(*(np.array(column, dtype=np.int64) for column in (greater, ties, candidates)))


def assert_same_ranks(left: Ranks, right: Ranks) -> None:
    np.testing.assert_array_equal(left.greater, right.greater)
    np.testing.assert_array_equal(left.ties, right.ties)
    np.testing.assert_array_equal(left.candidates, right.candidates)


# --- rank_candidates ---


def test_candidates_by_hand() -> None:
    score_BC = torch.tensor([[3.0, 1.0, 5.0, 3.0, 3.0], [9.0, 1.0, 2.0, 3.0, 4.0], [0.0, 1.0, 1.0, 2.0, 3.0]])
    ranks = rank_candidates(score_BC)
    assert_same_ranks(ranks, ranks_of([1, 0, 4], [2, 0, 0], [5, 5, 5]))
    assert ranks.greater.dtype == ranks.ties.dtype == ranks.candidates.dtype == np.int64


def test_infinities_are_ordinary_scores() -> None:
    inf = math.inf
    score_BC = torch.tensor([[inf, inf, 1.0], [-inf, -inf, 1.0], [-inf, 0.0, inf], [0.0, -inf, inf]])
    assert_same_ranks(rank_candidates(score_BC), ranks_of([0, 1, 2, 1], [1, 1, 0, 0], [3] * 4))


def test_scores_are_compared_in_fp32() -> None:
    # 1 + 1e-9 rounds to 1 in fp32: a tie. bf16 scores keep their own value.
    assert rank_candidates(torch.tensor([[1.0, 1.0 + 1e-9]], dtype=torch.float64)).ties.tolist() == [1]
    assert rank_candidates(torch.tensor([[1.0, 1.25]], dtype=torch.bfloat16)).greater.tolist() == [1]


def test_one_candidate_is_first() -> None:
    assert_same_ranks(rank_candidates(torch.zeros(2, 1)), ranks_of([0, 0], [0, 0], [1, 1]))


def test_nan_raises_and_names_the_rows() -> None:
    score_BC = torch.zeros(4, 3)
    score_BC[2, 0] = math.nan
    with pytest.raises(ValueError, match=r"NaN in 1 of 12 scores: row 2 of 4"):
        rank_candidates(score_BC)
    score_BC[3, 1:] = math.nan
    with pytest.raises(ValueError, match=r"NaN in 3 of 12 scores: 2 rows \(2, 3\) of 4"):
        rank_candidates(score_BC)


@pytest.mark.parametrize("shape", [(3,), (3, 0), (2, 3, 4)])
def test_other_shapes_raise(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="shape"):
        rank_candidates(torch.zeros(shape))


# --- metrics_per_target ---


def metric_at(rank: int, name: str) -> float:
    """Metric of one user without ties at a 0-based rank, straight from the definition."""
    if name == "MRR":
        return 1 / (rank + 1)
    kind, k = name.split("@")
    hit = float(rank < int(k))
    return hit if kind == "HR" else hit / math.log2(rank + 2)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=6))
def test_expectation_is_the_mean_over_all_orders_of_the_candidates(scores: list[int]) -> None:
    orders = list(itertools.permutations(range(len(scores))))
    # A stable sort of each order: ties are broken by the order in which the candidates happen to be stored.
    rank_of_order = [sorted(order, key=lambda c: -scores[c]).index(0) for order in orders]
    ranks = rank_candidates(torch.tensor([scores]))
    metrics = metrics_per_target(ranks, ks=(1, 2, 3, 5))
    best = metrics_per_target(ranks, ks=(1, 2, 3, 5), tie="optimistic")
    worst = metrics_per_target(ranks, ks=(1, 2, 3, 5), tie="pessimistic")
    for name in metrics:
        values = [metric_at(rank, name) for rank in rank_of_order]
        assert metrics[name][0] == pytest.approx(np.mean(values), abs=1e-12)
        assert best[name][0] == pytest.approx(max(values), abs=1e-12)
        assert worst[name][0] == pytest.approx(min(values), abs=1e-12)


def test_a_tie_across_the_cut_by_hand() -> None:
    # g = 8, t = 3: ranks 8, 9, 10, 11, of which 8 and 9 are inside k = 10.
    metrics = metrics_per_target(ranks_of([8], [3], [100]))
    assert metrics["HR@10"][0] == pytest.approx(2 / 4)
    assert metrics["NDCG@10"][0] == pytest.approx((1 / math.log2(10) + 1 / math.log2(11)) / 4)
    assert metrics["HR@5"][0] == 0.0
    assert metrics["HR@20"][0] == 1.0
    assert metrics["MRR"][0] == pytest.approx((1 / 9 + 1 / 10 + 1 / 11 + 1 / 12) / 4)


def test_hr_is_the_clamp_formula() -> None:
    greater_U, ties_U = (a.ravel() for a in np.meshgrid(np.arange(30), np.arange(30)))
    metrics = metrics_per_target(Ranks(greater_U, ties_U, np.full(900, 100)))
    for k in (1, 5, 10, 20):
        expected_U = np.clip((k - greater_U) / (ties_U + 1), 0, 1)
        np.testing.assert_allclose(metrics[f"HR@{k}"], expected_U, rtol=0, atol=1e-15)


def test_untied_metrics_are_exact_to_the_bit() -> None:
    metrics = metrics_per_target(Ranks(np.arange(100), np.zeros(100, dtype=np.int64), np.full(100, 100)))
    assert metrics["NDCG@20"].tolist() == [metric_at(rank, "NDCG@20") for rank in range(100)]
    assert metrics["MRR"].tolist() == [metric_at(rank, "MRR") for rank in range(100)]


def test_names_and_types() -> None:
    metrics = metrics_per_target(ranks_of([0], [0], [2]))
    assert tuple(metrics) == METRIC_NAMES
    assert METRIC_NAMES[:3] == ("HR@1", "HR@5", "HR@10")
    assert {(a.dtype, a.shape) for a in metrics.values()} == {(np.dtype(np.float64), (1,))}
    assert all(len(a) == 0 for a in metrics_per_target(ranks_of([], [], [])).values())


def test_unknown_tie_or_cut_raises() -> None:
    with pytest.raises(ValueError, match="not 'median'"):
        metrics_per_target(ranks_of([0], [0], [2]), tie="median")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 1"):
        metrics_per_target(ranks_of([0], [0], [2]), ks=(0, 10))


def test_all_tied_is_chance() -> None:
    # 100 candidates: HR@k = k / 100; NDCG@k = Σ_{r<k} 1 / log2(r + 2) / 100 = 0.0454 and 0.0704; MRR = H_100
    # / 100.
    metrics = metrics_per_target(rank_candidates(torch.zeros(3, 100)))
    assert metrics["HR@10"].tolist() == pytest.approx([0.1] * 3)
    assert metrics["HR@20"].tolist() == pytest.approx([0.2] * 3)
    assert metrics["NDCG@10"].round(4).tolist() == [0.0454] * 3
    assert metrics["NDCG@20"].round(4).tolist() == [0.0704] * 3
    assert metrics["MRR"][0] == pytest.approx(sum(1 / (r + 1) for r in range(100)) / 100)
    assert chance(100) == {name: value_U[0] for name, value_U in metrics.items()}
    assert chance(20)["HR@1"] == pytest.approx(0.05)
    with pytest.raises(ValueError, match="at least one candidate"):
        chance(0)


def test_random_scores_reach_chance() -> None:
    score_BC = torch.randn(20_000, 100, generator=torch.Generator().manual_seed(0))
    metrics = metrics_per_target(rank_candidates(score_BC))
    # Standard error of HR@10: sqrt(0.1 · 0.9 / 20000) = 0.0021; the tolerance is four of them.
    assert metrics["HR@10"].mean() == pytest.approx(0.1, abs=0.0085)


def test_untied_metrics_agree_with_ir_measures() -> None:
    generator = np.random.default_rng(0)
    # Distinct scores in each row: ir_measures would break ties by document name.
    score_BC = generator.permuted(np.tile(np.arange(100.0), (50, 1)), axis=1)
    metrics = metrics_per_target(rank_candidates(torch.from_numpy(score_BC)))
    run = {f"u{u}": {f"i{c}": score_BC[u, c] for c in range(100)} for u in range(50)}
    truth = {f"u{u}": {"i0": 1} for u in range(50)}
    measures: dict[str, Any] = {"MRR": ir_measures.RR}
    measures |= {f"HR@{k}": ir_measures.Success @ k for k in (1, 5, 10, 20)}
    measures |= {f"NDCG@{k}": ir_measures.nDCG @ k for k in (1, 5, 10, 20)}
    names = {measure: name for name, measure in measures.items()}
    seen = 0
    for entry in ir_measures.iter_calc(list(measures.values()), truth, run):
        assert metrics[names[entry.measure]][int(entry.query_id[1:])] == pytest.approx(entry.value, abs=1e-9)
        seen += 1
    assert seen == 50 * len(METRIC_NAMES)


# --- rank_catalog ---


def whole_numbers(seed: int, *shape: int) -> Tensor:
    """Small integers as floats: inner products are exact, and tie often."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).float()


def brute_force(user_BD: Tensor, item_ND: Tensor, target_B: Tensor, exclude: list[list[int]]) -> Ranks:
    rows: list[tuple[int, int, int]] = []
    for user, target, excluded in zip(user_BD, target_B.tolist(), exclude, strict=True):
        scores = {item: float(user @ item_ND[item - 1]) for item in range(1, len(item_ND) + 1)}
        others = [s for item, s in scores.items() if item != target and item not in excluded]
        above = sum(s > scores[target] for s in others)
        rows.append((above, sum(s == scores[target] for s in others), len(others) + 1))
    return ranks_of(*(list(column) for column in zip(*rows, strict=True)))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_catalog_equals_brute_force_for_any_chunk(data: st.DataObject) -> None:
    num_users, num_items = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 12))
    seed = data.draw(st.integers(0, 2**31))
    user_BD, item_ND = whole_numbers(seed, num_users, 3), whole_numbers(seed + 1, num_items, 3)
    ids = st.integers(1, num_items)
    target_B = torch.tensor(data.draw(st.lists(ids, min_size=num_users, max_size=num_users)))
    # Repeats, padding and the target itself included.
    history = st.lists(st.integers(0, num_items), max_size=8)
    exclude = data.draw(st.lists(history, min_size=num_users, max_size=num_users))
    chunk = data.draw(st.integers(1, 80))
    ours = rank_catalog(user_BD, item_ND, target_B, exclude, chunk=chunk)
    assert_same_ranks(ours, brute_force(user_BD, item_ND, target_B, exclude))


def test_catalog_by_hand() -> None:
    # Scores of items 1..5: 1, 4, 3, 3, 2. Target 3 (score 3): item 2 above, item 4 tied.
    user_BD, item_ND = torch.ones(3, 1), torch.tensor([[1.0], [4.0], [3.0], [3.0], [2.0]])
    target_B = torch.tensor([3, 3, 3])
    # Nothing excluded; items 2 and 4, twice and with padding; the target bought before is still ranked.
    exclude = [[], [2, 0, 4, 2, 0], [3, 1]]
    ranks = rank_catalog(user_BD, item_ND, target_B, exclude)
    assert_same_ranks(ranks, ranks_of([1, 0, 1], [1, 0, 1], [5, 3, 4]))
    # A padded history matrix gives the same as a list of lists.
    padded_BL = np.array([[0, 0, 0], [0, 2, 4], [0, 3, 1]])
    assert_same_ranks(rank_catalog(user_BD, item_ND, target_B, list(padded_BL)), ranks)


def test_catalog_of_real_vectors_is_the_same_in_chunks_and_under_autocast() -> None:
    generator = torch.Generator().manual_seed(3)
    user_BD = torch.randn(57, 64, generator=generator)
    item_ND = torch.randn(401, 64, generator=generator)
    item_ND[200:300] = item_ND[100:200]  # equal vectors, which must tie wherever the boundaries of matmul tiles fall
    target_B = torch.arange(101, 158)
    exclude = [[u + 1, u + 2] for u in range(57)]
    whole = rank_catalog(user_BD, item_ND, target_B, exclude)
    assert whole.ties.tolist() == [1] * 57
    for chunk in (1, 401, 5000, 10_000):
        assert_same_ranks(rank_catalog(user_BD, item_ND, target_B, exclude, chunk), whole)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_ranks(rank_catalog(user_BD, item_ND, target_B, exclude), whole)


def test_catalog_and_candidates_agree() -> None:
    user_BD, item_ND = whole_numbers(5, 8, 4), whole_numbers(6, 30, 4)
    target_B = torch.arange(1, 9)
    score_BN = user_BD @ item_ND.T
    moved_BN = torch.stack([torch.cat((row[u : u + 1], row[:u], row[u + 1 :])) for u, row in enumerate(score_BN)])
    assert_same_ranks(rank_catalog(user_BD, item_ND, target_B, [[]] * 8), rank_candidates(moved_BN))


def test_catalog_refuses_what_it_cannot_rank() -> None:
    user_BD, item_ND, target_B = torch.ones(2, 2), torch.ones(3, 2), torch.tensor([1, 3])
    with pytest.raises(ValueError, match=r"target ids run from 1 to 3; got 0\.\.1"):
        rank_catalog(user_BD, item_ND, torch.tensor([0, 1]), [[], []])
    with pytest.raises(ValueError, match=r"ids to exclude run from 1 to 3; got 2\.\.4"):
        rank_catalog(user_BD, item_ND, target_B, [[2], [4]])
    with pytest.raises(ValueError, match="entries for 1 users, but there are 2"):
        rank_catalog(user_BD, item_ND, target_B, [[]])
    user_BD[1, 0] = math.nan
    with pytest.raises(ValueError, match="NaN or infinity in the user vectors: row 1 of 2"):
        rank_catalog(user_BD, item_ND, target_B, [[], []])


def test_no_users_is_an_empty_ranking() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    assert len(rank_catalog(torch.zeros(0, 2), torch.ones(3, 2), none, [])) == 0
    assert len(concatenate([])) == 0


def test_concatenate_keeps_the_order() -> None:
    score_BC = whole_numbers(7, 10, 6)
    parts = [rank_candidates(score_BC[:3]), rank_candidates(score_BC[3:])]
    assert_same_ranks(concatenate(parts), rank_candidates(score_BC))


# --- bootstrap ---


def test_bootstrap_of_one_user_has_no_width() -> None:
    assert bootstrap(np.array([0.3]), seed=0) == Estimate(0.3, 0.3, 0.3)


def test_bootstrap_of_two_users_by_hand() -> None:
    # Means of two draws from {0, 1}: 0, 1/2, 1 with 1/4, 1/2, 1/4. The 2.5 % quantile is 0 and the 97.5 % one
    # is 1; at level 0.4 the 30 % and the 70 % quantile are both 1/2.
    values_U = np.array([0.0, 1.0])
    assert bootstrap(values_U, seed=1) == Estimate(0.5, 0.0, 1.0)
    assert bootstrap(values_U, seed=1, level=0.4) == Estimate(0.5, 0.5, 0.5)


def test_bootstrap_interval_is_the_normal_one_for_many_users() -> None:
    # HR of 10000 users at 0.25: standard error sqrt(0.25 · 0.75 / 10000) = 0.00433, half width 1.96 · that =
    # 0.00849.
    values_U = np.repeat([1.0, 0.0], [2500, 7500])
    estimate = bootstrap(values_U, seed=0)
    assert estimate.value == 0.25
    assert estimate.half_width == pytest.approx(0.00849, rel=0.08)
    assert estimate.low == pytest.approx(0.25 - 0.00849, abs=0.0008)


def test_bootstrap_is_deterministic_and_metrics_do_not_affect_each_other() -> None:
    generator = np.random.default_rng(0)
    metrics = {"a": generator.random(200), "b": generator.random(200)}
    both = bootstrap_all(metrics, seed=3)
    assert both == bootstrap_all(metrics, seed=3)
    assert both != bootstrap_all(metrics, seed=4)
    alone = bootstrap(metrics["b"], seed=3)
    assert (both["b"].value, both["b"].low, both["b"].high) == pytest.approx(
        (alone.value, alone.low, alone.high), rel=1e-12
    )


def test_bootstrap_refuses_bad_input() -> None:
    with pytest.raises(ValueError, match="at least one"):
        bootstrap(np.zeros(0), seed=0)
    with pytest.raises(ValueError, match="same users"):
        bootstrap_all({"a": np.zeros(2), "b": np.zeros(3)}, seed=0)
    with pytest.raises(ValueError, match="b is NaN for 1 of 2 users"):
        bootstrap_all({"a": np.zeros(2), "b": np.array([0.0, math.nan])}, seed=0)
    with pytest.raises(ValueError, match="level"):
        bootstrap(np.zeros(2), seed=0, level=95)
    assert bootstrap_all({}, seed=0) == {}


def test_reading_ranks_does_not_import_torch() -> None:
    program = "import sys, trainer.evaluation.ranking; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(ranking.__file__).parents[2])
