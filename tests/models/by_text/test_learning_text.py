"""Systems that read text learn planted order with a tiny random encoder: see `test_learning.py` for the dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers import build_world
from learning import learn, popularity

pytestmark = pytest.mark.training

BACKBONE = {"name": "sasrec", "dim": 16, "max_length": 16, "negatives": 8, "loss": "sampled_softmax"}
SYSTEMS: dict[str, dict[str, Any]] = {
    "ctrl-pca": {"name": "ctrl", "backbone": BACKBONE},
    "ctrl-linear": {"name": "ctrl", "backbone": BACKBONE, "adapter": "linear"},
    "recformer": {"name": "recformer", "max_items": 3, "max_tokens": 64, "dropout": 0.0},
}


@pytest.fixture(scope="module")
def ordered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_world(tmp_path_factory.mktemp("ordered"), users=500, items=50)


@pytest.mark.parametrize("name", SYSTEMS)
def test_order_is_learned_and_used(name: str, ordered: Path, tiny_encoder: Path) -> None:
    # One target per user and epoch gives less signal than a loss at every position.
    lr = 3e-3 if name == "recformer" else 1e-2
    learned = learn(ordered, SYSTEMS[name] | {"encoder": {"path": str(tiny_encoder)}}, epochs=15, lr=lr)
    assert learned.original > popularity(ordered) + 0.45
    assert learned.original > learned.shuffled + 0.1
