"""A trained system on the items of another dataset."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import build_world

from trainer.config import ConfigError, EvaluationConfig, RunConfig, parse_config
from trainer.data.reading.dataset import Dataset, open_dataset
from trainer.distributed import World
from trainer.evaluation.protocol import Evaluator
from trainer.models import build_system
from trainer.models.transfer import on_another_catalog

LLARA = {"name": "llara", "hidden_dim": 24, "projected_dim": 16, "max_history": 5}


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return open_dataset(build_world(tmp_path_factory.mktemp("other"), users=30, items=55, shards=1), full_check=False)


def metrics(config: RunConfig, source: Dataset, other: Dataset, unseen: str) -> dict[str, float]:
    system = build_system(config, source)
    system.model.eval()
    scoring = on_another_catalog(config, system, other, unseen)  # type: ignore[arg-type]
    evaluator = Evaluator(other, scoring, EvaluationConfig(batch_size=16), World(0, 1, torch.device("cpu")))
    found = evaluator.at_current_weights().evaluate("test")
    return {"users": float(len(found.ranks)), **found.means(evaluator.config)}


def config_of(world: Path, system: dict[str, object]) -> RunConfig:
    return parse_config({"output": "unused", "data": {"path": str(world)}, "system": system}, "test")


def test_a_system_of_ids_alone_ranks_by_chance(world: Path, other: Dataset) -> None:
    """20 candidates with one vector are tied: HR@10 is exactly a half. Random vectors are apart."""
    source, config = open_dataset(world, full_check=False), config_of(world, {"name": "sasrec", "dim": 16})
    for unseen in ("mean", "zero"):
        found = metrics(config, source, other, unseen)
        assert found["users"] == 30
        assert found["HR@10"] == pytest.approx(0.5)
        assert found["HR@1"] == pytest.approx(0.05)
    assert metrics(config, source, other, "random")["HR@10"] != pytest.approx(0.5)


def test_a_system_that_reads_titles_tells_unseen_items_apart(
    world: Path, other: Dataset, teacher: Path, tiny_llm: Path
) -> None:
    llm = {"path": str(tiny_llm), "dtype": "float32", "max_tokens": 256}
    config = config_of(world, LLARA | {"teacher": str(teacher), "llm": llm})
    found = metrics(config, open_dataset(world, full_check=False), other, "mean")
    assert found["users"] == 30
    assert found["HR@10"] != pytest.approx(0.5)


def test_a_teacher_that_knows_titles_takes_those_of_the_other_dataset(
    world: Path, other: Dataset, teacher: Path, tiny_llm: Path
) -> None:
    llm = {"path": str(tiny_llm), "dtype": "float32", "max_tokens": 256}
    section = {"name": "llm_srec", "teacher": str(teacher), "llm": llm, "user_vector": True}
    found = {
        weight: metrics(
            config_of(world, section | {"teacher_titles": weight}), open_dataset(world, full_check=False), other, "mean"
        )
        for weight in (0.0, 0.5)
    }
    assert found[0.5]["users"] == 30
    assert found[0.5]["NDCG@10"] != pytest.approx(found[0.0]["NDCG@10"])


def test_systems_that_cannot(world: Path, other: Dataset) -> None:
    config = config_of(world, {"name": "gru4rec", "dim": 16})
    system = build_system(config, open_dataset(world, full_check=False))
    with pytest.raises(ConfigError, match="gru4rec cannot be evaluated on another dataset yet"):
        on_another_catalog(config, system, replace(other), "mean")
