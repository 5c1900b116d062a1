"""No system by id or around an LLM reads a value between a batch and its gradients: a GPU's host would wait for it.

Tensors on the device `meta` have shapes and no values, so that whatever depends on one raises there: `item`, boolean
masks as indices, `nonzero`. (Text encoders of transformers read one value per pass, to find out whether there is
padding.)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import LLM_SYSTEMS, llm4rec_config, sasrec_config

from trainer.config import parse_config
from trainer.data.collators.base import to_device
from trainer.data.reading.dataset import open_dataset
from trainer.data.reading.shards import read_in_order
from trainer.models import build_system

META = torch.device("meta")
SIZES = {"dim": 16, "max_length": 12}
BY_ID: dict[str, dict[str, Any]] = {
    "sasrec": SIZES,
    "sasrec-gbce": SIZES | {"loss": "gbce", "negatives": 3},
    "sasrec-full_softmax": SIZES | {"loss": "full_softmax"},
    "gru4rec": {"layers": 2},
    "gru4rec-full_softmax": {"loss": "full_softmax"},
    "bert4rec": SIZES,
    "nextitnet": {"dilations": [1, 2]},
}
BY_LLM: dict[str, dict[str, Any]] = {name: {} for name in LLM_SYSTEMS} | {
    "llm_srec-window": {"targets": "window"},
    "llm_srec-batch": {"targets": "window", "train_candidates": "batch", "score_distill_weight": 0.5},
    "llm_srec-titles": {"user_vector": True, "teacher_titles": 0.5},
    "collm-rows": {"llm": {"packing": "rows"}},
    "tallrec-generation": {"llm": {"max_tokens": 320}},
}


def _step_on_meta(tree: dict[str, Any], world: Path) -> None:
    """Run what happens between a batch and its gradients."""
    dataset = open_dataset(world, full_check=False)
    system = build_system(parse_config(tree, "test"), dataset)
    users = next(read_in_order(world, dataset.manifest)).take(slice(0, 6))
    batch = to_device(system.collator.train(users, slice(0, 6), 0), META)
    model: Any = system.model
    model.train()
    model.to(META)
    losses = model.loss(model(batch))
    losses.total.backward()
    assert losses.total.device == META
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", BY_ID)
def test_a_system_by_id_reads_no_values(name: str, world: Path, tmp_path: Path) -> None:
    tree = sasrec_config(world, tmp_path) | {"system": {"name": name.split("-")[0]} | BY_ID[name]}
    _step_on_meta(tree, world)


@pytest.mark.parametrize("name", BY_LLM)
def test_a_system_around_an_llm_reads_no_values(
    name: str, world: Path, teacher: Path, stage1: Path, tiny_llm: Path, tmp_path: Path
) -> None:
    tree = llm4rec_config(name.split("-")[0], world, tmp_path, tiny_llm, {"teacher": teacher, "stage1": stage1})
    llm = tree["system"]["llm"] | BY_LLM[name].get("llm", {})
    tree["system"] |= BY_LLM[name] | {"llm": llm}
    if name.endswith("generation"):
        tree |= {"task": "generation"}
        tree["train"] |= {"metric": "HR@1"}
    _step_on_meta(tree, world)
