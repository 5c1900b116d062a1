"""The evaluator against a plain reading of the protocol."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from trainer.config import EvaluationConfig
from trainer.data.collators.base import ItemIds, ItemSequences
from trainer.data.collators.sequences import SequenceCollator
from trainer.data.reading.dataset import Dataset, open_dataset
from trainer.data.reading.histories import Users
from trainer.data.reading.shards import read_in_order
from trainer.distributed import World
from trainer.evaluation.protocol import Evaluator

WORLD = World(0, 1, torch.device("cpu"))


@dataclass
class LastItem:
    """A recommender whose user vector depends on the order: the sum of items weighted by their place."""

    table: Tensor
    item_calls: int = 0

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


def _evaluator(dataset: Dataset, **settings: Any) -> Evaluator:
    collator = SequenceCollator(dataset.num_items, max_history=6, negatives=1, fixed_length=True, seed=0)
    return Evaluator(dataset, collator, EvaluationConfig(batch_size=7, **settings), WORLD)


def _rank_by_hand(dataset: Dataset, model: LastItem, users: Users, split: str, user: int) -> tuple[int, int]:
    history, targets = users.targets(split)  # type: ignore[arg-type]
    row = int(np.flatnonzero(history.user_U == user)[0])
    one = history.take(slice(row, row + 1))
    vector = model.user_vectors(ItemSequences(torch.from_numpy(one.padded(6)), None))[0]  # type: ignore[arg-type]
    scores = model.table @ vector
    target = float(scores[targets[row]])
    negatives = dataset.candidates("retrieval", split)[user]  # type: ignore[arg-type]
    sampled = sum(float(scores[item]) > target for item in negatives)
    seen = set(one.item_E.tolist())
    full = sum(
        float(scores[i]) > target for i in range(1, dataset.num_items + 1) if i not in seen and i != targets[row]
    )
    return sampled, full


@pytest.mark.parametrize("split", ["valid", "test"])
def test_ranks_equal_a_plain_reading(parts: tuple[Dataset, LastItem, Users], split: str) -> None:
    dataset, model, users = parts
    sampled, full = _evaluator(dataset), _evaluator(dataset, candidates="full")
    item_ND = sampled.encode_items(model)  # type: ignore[arg-type]
    by_sample = sampled.evaluate(model, item_ND, split).ranks  # type: ignore[arg-type]
    by_catalog = full.evaluate(model, item_ND, split).ranks  # type: ignore[arg-type]
    assert len(by_sample) == len(by_catalog) == 61
    for user in range(61):
        assert (by_sample.greater[user], by_catalog.greater[user]) == _rank_by_hand(dataset, model, users, split, user)
    assert set(by_sample.candidates) == {20}


def test_each_item_is_encoded_once(parts: tuple[Dataset, LastItem, Users]) -> None:
    dataset, model, _ = parts
    model.item_calls = 0
    item_ND = _evaluator(dataset).encode_items(model)  # type: ignore[arg-type]
    assert model.item_calls == dataset.num_items
    assert torch.equal(item_ND, model.table[1:])


def test_a_shuffled_history_keeps_its_items(parts: tuple[Dataset, LastItem, Users]) -> None:
    """A model that only sums what it sees cannot tell; one that weighs places can."""
    dataset, model, _ = parts

    class Bag(LastItem):
        def user_vectors(self, batch: ItemSequences) -> Tensor:
            return self.table[batch.item_BL].sum(1)

    evaluator = _evaluator(dataset)
    bag = Bag(model.table)
    item_ND = evaluator.encode_items(bag)  # type: ignore[arg-type]

    def ranks(m: LastItem, history: str) -> list[int]:
        return evaluator.evaluate(m, item_ND, "test", history).ranks.greater.tolist()  # type: ignore[arg-type]

    assert ranks(bag, "shuffled") == ranks(bag, "original")
    assert ranks(model, "shuffled") != ranks(model, "original")
    assert ranks(model, "shuffled") == ranks(model, "shuffled")


def test_a_sample_of_users_is_fixed_and_has_the_size_asked_for(parts: tuple[Dataset, LastItem, Users]) -> None:
    dataset, model, _ = parts
    everyone = _evaluator(dataset)
    item_ND = everyone.encode_items(model)  # type: ignore[arg-type]
    whole = everyone.evaluate(model, item_ND, "test").ranks.greater  # type: ignore[arg-type]
    some = _evaluator(dataset, users=20)
    first = some.evaluate(model, item_ND, "test").ranks.greater.tolist()  # type: ignore[arg-type]
    assert len(first) == 20
    assert first == some.evaluate(model, item_ND, "test").ranks.greater.tolist()  # type: ignore[arg-type]
    chosen = some._sample()
    assert chosen is not None
    assert first == whole[chosen].tolist()
    other = _evaluator(dataset, users=20, seed=1)._sample()
    assert other is not None
    assert other.tolist() != chosen.tolist()


def test_validation_may_use_fewer_users_than_the_test(parts: tuple[Dataset, LastItem, Users]) -> None:
    dataset, model, _ = parts
    few = _evaluator(dataset, valid_users=20)
    assert few.validate(model) == _evaluator(dataset, users=20).validate(model)  # type: ignore[arg-type]
    assert few.validate(model) != _evaluator(dataset).validate(model)  # type: ignore[arg-type]
    assert len(few.evaluate(model, few.encode_items(model), "test").ranks) == 61  # type: ignore[arg-type]


def test_nan_is_refused(parts: tuple[Dataset, LastItem, Users]) -> None:
    dataset, model, _ = parts
    evaluator = _evaluator(dataset)
    item_ND = evaluator.encode_items(model).clone()  # type: ignore[arg-type]
    item_ND[3] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        evaluator.evaluate(model, item_ND, "test")  # type: ignore[arg-type]
