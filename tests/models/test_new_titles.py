"""Systems that read titles alone read those that their catalog does not have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trainer.config import RunConfig, parse_config, reads_titles_alone
from trainer.data.reading.dataset import Dataset, open_dataset
from trainer.data.reading.histories import Histories
from trainer.models import build_system
from trainer.models.new_titles import reading_new_titles

DEVICE = torch.device("cpu")


def configured(world: Path, system: dict[str, Any]) -> RunConfig:
    return parse_config({"output": "unused", "data": {"path": str(world)}, "system": system}, "test")


def history(*items: int) -> Histories:
    item_E = np.array(items, np.int64)
    return Histories(np.zeros(1, np.int64), np.array([0, len(items)]), item_E, 10**12 + np.arange(len(items)))


@pytest.fixture(scope="module")
def dataset(world: Path) -> Dataset:
    return open_dataset(world, full_check=False)


@pytest.mark.parametrize("name", ["tallrec", "recformer"])
def test_a_new_title_is_read_like_a_known_one(
    name: str, world: Path, dataset: Dataset, tiny_llm: Path, tiny_encoder: Path
) -> None:
    sections: dict[str, dict[str, Any]] = {
        "tallrec": {
            "hidden_dim": 24,
            "projected_dim": 16,
            "llm": {"path": str(tiny_llm), "dtype": "float32", "max_tokens": 256},
        },
        "recformer": {"encoder": {"path": str(tiny_encoder)}, "attributes": ["title"], "max_tokens": 64},
    }
    config = configured(world, {"name": name} | sections[name])
    assert reads_titles_alone(config.system)
    system = build_system(config, dataset)
    system.model.eval()
    same, other = dataset.num_items + 1, dataset.num_items + 2
    scoring = reading_new_titles(config, system, dataset, [dataset.titles[4], "Something Else"])
    with torch.no_grad():
        known, new, third = (scoring.user_vectors(history(7, item, 2), DEVICE).vector_BD for item in (5, same, other))
        before = system.vectors.user_vectors(history(7, 5, 2), DEVICE).vector_BD
    torch.testing.assert_close(new, known)
    torch.testing.assert_close(known, before)
    assert not torch.allclose(third, known)


def test_systems_that_read_ids_do_not(world: Path, teacher: Path, tiny_llm: Path) -> None:
    llm = {"path": str(tiny_llm)}
    for section in ({"name": "sasrec"}, {"name": "llm_srec", "teacher": str(teacher), "llm": llm}):
        assert not reads_titles_alone(configured(world, section).system)
