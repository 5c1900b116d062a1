"""The evaluator against a plain implementation of the protocol."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from trainer.config import EvaluationConfig, HistoryOrder, Split
from trainer.data.collators.base import BatchRows, ItemIds, ItemSequences
from trainer.data.collators.sequences import SequenceCollator
from trainer.data.reading.dataset import Dataset, open_dataset
from trainer.data.reading.histories import Users
from trainer.data.reading.shards import read_in_order
from trainer.distributed import World
from trainer.evaluation.protocol import Evaluator
from trainer.evaluation.rankers import VectorRanker
from trainer.models.scoring import VectorScoring

WORLD = World(0, 1, torch.device("cpu"))


class LastItem(nn.Module):
    """A recommender whose user vector depends on the order: the sum of item vectors weighted by position."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = table
        self.item_calls = 0

    def user_vectors(self, batch: ItemSequences) -> Tensor:
        weight_L = torch.linspace(0.1, 1.0, batch.item_BL.shape[1]).flip(0) ** 3
        return (self.table[batch.item_BL] * weight_L.flip(0)[None, :, None] * (batch.item_BL > 0)[..., None]).sum(1)

    def item_vectors(self, batch: ItemIds) -> Tensor:
        self.item_calls += len(batch.item_M)
        return self.table[batch.item_M]


@pytest.fixture(scope="module")
def parts(world: Path) -> tuple[Dataset, LastItem, Users]:
    dataset = open_dataset(world, full_check=True)
    table = torch.randn(dataset.num_items + 1, 8, generator=torch.Generator().manual_seed(0))
    return dataset, LastItem(table), next(read_in_order(world, dataset.manifest))


def _evaluator(dataset: Dataset, model: LastItem, **settings: Any) -> Evaluator:
    collator = SequenceCollator(dataset.num_items, max_history=6, negatives=1, fixed_length=True, seed=0)
    scoring = VectorScoring(model, collator)
    return Evaluator(dataset, scoring, EvaluationConfig(batch_size=7, **settings), WORLD)


def _rank_by_hand(dataset: Dataset, model: LastItem, users: Users, split: Split, user: int) -> tuple[int, int]:
    history, targets = users.targets(split)
    row = int(np.flatnonzero(history.user_U == user)[0])
    one = history.take(slice(row, row + 1))
    vector = model.user_vectors(ItemSequences(torch.from_numpy(one.padded(6)), BatchRows(0, 1, 1)))[0]
    scores = model.table @ vector
    target = float(scores[targets[row]])
    negatives = dataset.candidates("retrieval", split)[user]
    sampled = sum(float(scores[item]) > target for item in negatives)
    seen = set(one.item_E.tolist())
    full = sum(
        float(scores[i]) > target for i in range(1, dataset.num_items + 1) if i not in seen and i != targets[row]
    )
    return sampled, full


@pytest.mark.parametrize("split", get_args(Split))
def test_ranks_equal_a_plain_implementation(parts: tuple[Dataset, LastItem, Users], split: Split) -> None:
    dataset, model, users = parts
    by_sample = _evaluator(dataset, model).at_current_weights().evaluate(split).ranks
    by_catalog = _evaluator(dataset, model, candidates="full").at_current_weights().evaluate(split).ranks
    assert len(by_sample) == len(by_catalog) == 61
    for user in range(61):
        assert (by_sample.greater[user], by_catalog.greater[user]) == _rank_by_hand(dataset, model, users, split, user)
    assert set(by_sample.candidates) == {20}


def test_full_ranking_with_seen_items_ranks_them_too(parts: tuple[Dataset, LastItem, Users]) -> None:
    dataset, model, users = parts
    found = _evaluator(dataset, model, candidates="full_with_seen").at_current_weights(list_length=3).evaluate("test")
    assert set(found.ranks.candidates) == {dataset.num_items}
    histories, target_U = users.targets("test")
    score_UN = model.user_vectors(ItemSequences(torch.from_numpy(histories.padded(6)), BatchRows(0, 61, 61)))
    score_UN = score_UN @ model.table[1:].T
    target_U1 = score_UN.gather(1, torch.from_numpy(target_U)[:, None] - 1)
    assert found.ranks.greater.tolist() == (score_UN > target_U1).sum(1).tolist()
    assert found.top_TK.tolist() == (score_UN.argsort(dim=1, descending=True)[:, :3] + 1).tolist()


@pytest.mark.parametrize("candidates", ["sampled", "full"])
def test_lists_leave_out_seen_items(parts: tuple[Dataset, LastItem, Users], candidates: str) -> None:
    dataset, model, users = parts
    evaluator = _evaluator(dataset, model, candidates=candidates)
    found = evaluator.at_current_weights(list_length=10).evaluate_together(["valid", "test"])["test"]
    histories, _ = users.targets("test")
    for row in range(len(histories)):
        seen = set(histories.take(slice(row, row + 1)).item_E.tolist())
        assert len(set(found.top_TK[row].tolist()) - seen - {0}) == 10
    assert evaluator.at_current_weights().evaluate("test").top_TK.shape == (61, 0)
    assert found.ranks.greater.tolist() == evaluator.at_current_weights().evaluate("test").ranks.greater.tolist()


def test_each_item_is_encoded_once(parts: tuple[Dataset, LastItem, Users]) -> None:
    dataset, model, _ = parts
    model.item_calls = 0
    ranking = _evaluator(dataset, model).at_current_weights()
    assert model.item_calls == dataset.num_items
    assert isinstance(ranking.ranker, VectorRanker)
    assert torch.equal(ranking.ranker.item_ND, model.table[1:])
    ranking.evaluate_together(["valid", "test"])
    assert model.item_calls == dataset.num_items, "users are ranked against the vectors already computed"


def test_a_shuffled_history_keeps_its_items(parts: tuple[Dataset, LastItem, Users]) -> None:
    """A model that sums item vectors is unaffected by shuffling; one that weights positions is not."""
    dataset, model, _ = parts

    class Bag(LastItem):
        def user_vectors(self, batch: ItemSequences) -> Tensor:
            return self.table[batch.item_BL].sum(1)

    bag = Bag(model.table)

    def ranks(m: LastItem, history: HistoryOrder) -> list[int]:
        greater: list[int] = (
            _evaluator(dataset, m).at_current_weights().evaluate("test", history).ranks.greater.tolist()
        )
        return greater

    assert ranks(bag, "shuffled") == ranks(bag, "original")
    assert ranks(model, "shuffled") != ranks(model, "original")
    assert ranks(model, "shuffled") == ranks(model, "shuffled")


def test_a_sample_of_users_is_fixed_and_has_the_requested_size(parts: tuple[Dataset, LastItem, Users]) -> None:
    dataset, model, _ = parts
    whole = _evaluator(dataset, model).at_current_weights().evaluate("test").ranks.greater
    some = _evaluator(dataset, model, users=20).at_current_weights()
    first = some.evaluate("test").ranks.greater.tolist()
    assert len(first) == 20
    assert first == some.evaluate("test").ranks.greater.tolist()
    chosen = some.evaluator.sampled_users(["test"])
    assert chosen is not None
    assert first == whole[chosen].tolist()
    other = _evaluator(dataset, model, users=20, seed=1).at_current_weights().evaluator.sampled_users(["test"])
    assert other is not None
    assert other.tolist() != chosen.tolist()


def test_validation_may_use_fewer_users_than_the_test(parts: tuple[Dataset, LastItem, Users]) -> None:
    dataset, model, _ = parts
    few = _evaluator(dataset, model, valid_users=20)
    assert few.validate() == _evaluator(dataset, model, users=20).validate()
    assert few.validate() != _evaluator(dataset, model).validate()
    assert len(few.at_current_weights().evaluate("test").ranks) == 61


def test_nan_is_refused(parts: tuple[Dataset, LastItem, Users]) -> None:
    dataset, model, _ = parts
    ranking = _evaluator(dataset, model).at_current_weights()
    assert isinstance(ranking.ranker, VectorRanker)
    item_ND = ranking.ranker.item_ND.clone()
    item_ND[3] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        replace(ranking, ranker=replace(ranking.ranker, item_ND=item_ND)).evaluate("test")
