"""LLM recommenders learn planted order with a tiny random LLM: see `test_learning.py` for the dataset.

Their margins are smaller than those of the systems that know items by number: one target a user and epoch, and an LLM
that knows no words. TALLRec has the least to go by, for to a random LLM titles that share a word are nearly the same.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import LLM_SYSTEMS, build_world, llm4rec_config, run_command, sasrec_config, text_config, write_config
from learning import learn, popularity

pytestmark = pytest.mark.training

MARGIN = {"tallrec": 0.08, "llara": 0.15, "collm": 0.25, "a_llmrec": 0.2, "llm_srec": 0.25}
GENTLE = {"dropout": 0.0, "alpha": 4}  # the official values make training of a random LLM unstable at once


@pytest.fixture(scope="module")
def ordered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_world(tmp_path_factory.mktemp("ordered"), users=240, items=36, order=0.95)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, ordered: Path, tiny_encoder: Path) -> dict[str, Path]:
    """A teacher that has learned the order, and a stage-1 run on top of it."""
    folder = tmp_path_factory.mktemp("runs")
    section = {"name": "a_llmrec_stage1", "teacher": str(folder / "teacher"), "encoder": {"path": str(tiny_encoder)}}
    sizes = {"latent_dim": 12, "max_tokens": 32}
    trees = {
        "teacher": sasrec_config(ordered, folder / "teacher", epochs=30, patience=30),
        "stage1": text_config(ordered, folder / "stage1", section | sizes, epochs=8),
    }
    for key, tree in trees.items():
        done = run_command("launchers/train.py", write_config(folder / f"{key}.yaml", tree))
        assert done.returncode == 0, done.stderr
    return {key: folder / key for key in trees}


@pytest.mark.parametrize("name", LLM_SYSTEMS)
def test_order_is_learned(name: str, ordered: Path, runs: dict[str, Path], tiny_llm: Path) -> None:
    section = llm4rec_config(name, ordered, Path("unused"), tiny_llm, runs)["system"]
    section["readout_init"] = "standardized"
    if name in ("tallrec", "llara", "collm"):
        section["lora"] = GENTLE
    lr = 1e-3 if "lora" in section else 3e-3
    learned = learn(ordered, section, epochs=10, lr=lr, batch_size=20)
    assert learned.original > popularity(ordered) + MARGIN[name]
