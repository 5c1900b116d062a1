"""Cosine of user vectors for the original and the shuffled history, on a model whose vectors are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from trainer.config import EvaluationConfig
from trainer.data.collators.base import ItemIds, ItemSequences
from trainer.data.collators.sequences import SequenceCollator
from trainer.data.reading.dataset import open_dataset
from trainer.data.reading.shards import read_in_order
from trainer.distributed import World
from trainer.evaluation.order.similarity import user_similarity
from trainer.evaluation.protocol import Evaluator
from trainer.models.scoring import VectorScoring

WINDOW = 4


class Weighted(nn.Module):
    """The sum of one-hot items, weighted by position: with equal weights, order makes no difference."""

    def __init__(self, weights: list[float]) -> None:
        super().__init__()
        self.weight_L1 = torch.tensor(weights)[:, None]

    def user_vectors(self, batch: ItemSequences) -> Tensor:
        one_hot_BLN = torch.nn.functional.one_hot(batch.item_BL, 41).float()
        return (one_hot_BLN * self.weight_L1[-batch.item_BL.shape[1] :]).sum(1)[:, 1:]

    def item_vectors(self, batch: ItemIds) -> Tensor:
        return torch.nn.functional.one_hot(batch.item_M, 41).float()[:, 1:]


def evaluator(world: Path, weights: list[float], users: int | None = None) -> Evaluator:
    dataset = open_dataset(world, full_check=False)
    scoring = VectorScoring(Weighted(weights), SequenceCollator(dataset.num_items, WINDOW, 0, True, 0))
    return Evaluator(dataset, scoring, EvaluationConfig(batch_size=7, users=users), World(0, 1, torch.device("cpu")))


def test_a_system_without_order_does_not_move(world: Path) -> None:
    user_U, cosine_U = user_similarity(evaluator(world, [1.0] * WINDOW).at_current_weights())
    assert user_U.tolist() == list(range(61))
    assert cosine_U == pytest.approx(1.0)


def test_cosines_by_hand(world: Path) -> None:
    """Only the items that the system reads are shuffled, as in the shuffled test."""
    some = evaluator(world, [1.0, 2.0, 3.0, 4.0])
    user_U, cosine_U = user_similarity(some.at_current_weights())
    [users] = read_in_order(world, some.dataset.manifest)
    histories, _ = users.targets("test")
    shown = histories.last(WINDOW)
    rows = zip(shown.padded(WINDOW), shown.shuffled(0).padded(WINDOW), strict=True)
    for (before, after), cosine in zip(rows, cosine_U, strict=True):
        vectors = np.zeros((2, 41))
        for vector, items in zip(vectors, (before, after), strict=True):
            np.add.at(vector, items, [1.0, 2.0, 3.0, 4.0])
        vectors[:, 0] = 0  # padding
        assert cosine == pytest.approx(vectors[0] @ vectors[1] / np.prod(np.linalg.norm(vectors, axis=1)), abs=1e-6)
    assert cosine_U.mean() < 0.99
    nine = evaluator(world, [1.0, 2.0, 3.0, 4.0], users=9)
    sampled_U, of_sample_U = user_similarity(nine.at_current_weights())
    assert of_sample_U == pytest.approx(cosine_U[np.isin(user_U, sampled_U)])
    assert len(sampled_U) == 9
