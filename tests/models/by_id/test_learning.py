"""Every system that uses item ids learns planted order; a system that cannot see order gains nothing from it.

In the dataset with order, each item has one successor, which follows it in 85 of 100 cases; in the other, items are
random. Among 20 candidates, chance and popularity have an NDCG@10 of 0.23; knowing the successors gives about 0.88.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import build_world
from learning import learn, popularity, train
from torch import Tensor, nn

from trainer.data.collators.base import ItemIds, ItemSequences
from trainer.data.collators.sequences import SequenceCollator, SequenceTraining
from trainer.data.reading.dataset import open_dataset
from trainer.models.by_id.sequence_terms import SequenceTerms, by_user, mean_over_positions
from trainer.models.interface import Losses
from trainer.models.system import vector_system
from trainer.nn import losses
from trainer.nn.item_table import ItemTable

pytestmark = pytest.mark.training

SIZES: dict[str, Any] = {"dim": 32, "max_length": 16, "dropout": 0.1}
SYSTEMS: dict[str, dict[str, Any]] = {
    "sasrec-bce": {"name": "sasrec", "negatives": 4},
    "sasrec-sampled_softmax": {"name": "sasrec", "negatives": 8, "loss": "sampled_softmax"},
    "sasrec-full_softmax": {"name": "sasrec", "loss": "full_softmax"},
    "sasrec-gbce": {"name": "sasrec", "negatives": 8, "loss": "gbce"},
    "gru4rec-full_softmax": {"name": "gru4rec"},
    "gru4rec-bpr_max": {"name": "gru4rec", "loss": "bpr_max", "negatives": 20},
    "bert4rec": {"name": "bert4rec", "last_item_share": 0.8},
    "nextitnet-two_layer": {"name": "nextitnet", "dilations": [1]},
    "nextitnet-one_layer": {"name": "nextitnet", "dilations": [1], "block": "one_layer"},
}


@pytest.fixture(scope="module")
def ordered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_world(tmp_path_factory.mktemp("ordered"), users=500, items=50)


@pytest.fixture(scope="module")
def random_walks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_world(tmp_path_factory.mktemp("random"), users=500, items=50, order=0.0)


@pytest.mark.parametrize("name", SYSTEMS)
def test_order_is_learned_and_used(name: str, ordered: Path) -> None:
    # One mask per user gives less signal than a loss at every position, and post-norm needs a smaller learning rate.
    epochs, lr = (40, 3e-3) if name == "bert4rec" else (15, 1e-2)
    learned = learn(ordered, SIZES | SYSTEMS[name], epochs=epochs, lr=lr)
    assert learned.original > popularity(ordered) + 0.55
    assert learned.original > learned.shuffled + 0.25


def test_nothing_is_gained_where_there_is_no_order(random_walks: Path) -> None:
    learned = learn(random_walks, SIZES | SYSTEMS["sasrec-full_softmax"], epochs=15, lr=1e-2)
    assert learned.original < popularity(random_walks) + 0.05
    assert learned.original == pytest.approx(learned.shuffled, abs=0.05)


class _Bag(nn.Module):
    """The mean of the item vectors of a history, which is independent of their order."""

    def __init__(self, num_items: int) -> None:
        super().__init__()
        self.inputs, self.items = nn.Embedding(num_items + 1, 32, padding_idx=0), ItemTable(num_items, 32)

    def forward(self, batch: SequenceTraining) -> SequenceTerms:
        item_BL = batch.input.item_BL
        sum_BLD = self.inputs(item_BL).cumsum(1)
        count_BL1 = (item_BL > 0).cumsum(1).clamp(min=1)[:, :, None]
        query_MD = self.items.query((sum_BLD / count_BL1).flatten(0, 1)[batch.position_M])
        loss_M = losses.catalog_softmax(query_MD, self.items.catalog(), batch.target_BL.flatten()[batch.position_M])
        return by_user(loss_M, batch.position_M, batch.target_BL)

    def loss(self, terms: SequenceTerms) -> Losses:
        return mean_over_positions(terms, "full_softmax")

    def user_vectors(self, batch: ItemSequences) -> Tensor:
        count_B1 = (batch.item_BL > 0).sum(1, keepdim=True)
        return self.items.query(self.inputs(batch.item_BL).sum(1) / count_B1)

    def item_vectors(self, batch: ItemIds) -> Tensor:
        return self.items.output(batch.item_M)


def test_a_system_that_cannot_see_order_gains_nothing_from_it(ordered: Path) -> None:
    dataset = open_dataset(ordered, full_check=False)
    torch.manual_seed(0)
    collator = SequenceCollator(dataset.num_items, 16, negatives=0, fixed_length=False, seed=0)
    blind = train(vector_system(_Bag(dataset.num_items), collator), dataset, epochs=15, lr=1e-2)
    # It does learn something: in a chain of successors, the item missing from the history is likely the next one.
    assert blind.original > popularity(ordered) + 0.3
    assert blind.original == pytest.approx(blind.shuffled, abs=1e-6)
