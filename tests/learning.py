"""Train and evaluate a small system in this process; shared by the tests that a system learns."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trainer.config import EvaluationConfig, HistoryOrder, parse_config
from trainer.data.collators.base import ItemIds, ItemSequences
from trainer.data.collators.sequences import SequenceCollator
from trainer.data.loader import StepLoader
from trainer.data.reading.counter_rng import torch_seed
from trainer.data.reading.dataset import Dataset, open_dataset
from trainer.data.reading.shards import read_in_order
from trainer.distributed import World
from trainer.evaluation.protocol import Evaluator
from trainer.models import AnySystem, build_system
from trainer.models.scoring import VectorScoring

SETTINGS = EvaluationConfig(batch_size=512)
ALONE = World(0, 1, torch.device("cpu"))


@dataclass(frozen=True)
class Learned:
    """NDCG@10 on the test items, for original and for shuffled histories."""

    original: float
    shuffled: float


def learn(data: Path, section: dict[str, Any], *, epochs: int, lr: float, batch_size: int = 64) -> Learned:
    """Build and train the system of a config section."""
    tree = {"output": "unused", "data": {"path": str(data)}, "system": section}
    dataset = open_dataset(data, full_check=False)
    return train(
        build_system(parse_config(tree, "test"), dataset), dataset, epochs=epochs, lr=lr, batch_size=batch_size
    )


def train(system: AnySystem, dataset: Dataset, *, epochs: int, lr: float, batch_size: int = 64) -> Learned:
    """Run the engine's training loop, on one rank and without DeepSpeed."""
    model = system.model
    loader = StepLoader(
        dataset, system.collator, batch_size, 1, shuffle_shards=8, seed=0, workers=0, rank=0, world_size=1
    )
    evaluator = Evaluator(dataset, system.scoring, SETTINGS, ALONE)
    if system.initialize:
        system.initialize(ALONE.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for epoch in range(epochs):
        if system.epoch_items:
            evaluator.refresh(system.epoch_items)
        model.train()
        for step, batches in enumerate(loader.epoch(epoch)):
            torch.manual_seed(torch_seed(0, epoch, step))
            optimizer.zero_grad()
            model.loss(model.forward(batches.micro_batches[0])).total.backward()
            optimizer.step()
    model.eval()
    ranking = evaluator.at_current_weights()
    histories: tuple[HistoryOrder, ...] = ("original", "shuffled")
    original, shuffled = (ranking.evaluate("test", history).means(SETTINGS)["NDCG@10"] for history in histories)
    return Learned(original, shuffled)


def popularity(data: Path) -> float:
    """NDCG@10 of ranking items by their count in the training sequences."""
    dataset = open_dataset(data, full_check=False)
    count = np.zeros(dataset.num_items + 1)
    for users in read_in_order(dataset.path, dataset.manifest):
        count += np.bincount(users.train.item_E, minlength=len(count))

    class Popularity(nn.Module):
        def user_vectors(self, batch: ItemSequences) -> Tensor:
            return torch.ones(len(batch.item_BL), 1)

        def item_vectors(self, batch: ItemIds) -> Tensor:
            return torch.from_numpy(count)[batch.item_M][:, None]

    scoring = VectorScoring(Popularity(), SequenceCollator(dataset.num_items, 12, 0, False, 0))
    ranking = Evaluator(dataset, scoring, SETTINGS, ALONE).at_current_weights()
    return ranking.evaluate("test").means(SETTINGS)["NDCG@10"]
