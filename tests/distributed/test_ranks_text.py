"""Systems that read text, under real DeepSpeed: the same losses at one and two ranks, and an item table that resumes.

Dropout is on everywhere, and the last batch has one user, so that one of two ranks has none.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import run_ranks, text_config
from safetensors.numpy import load_file

WORKER = Path(__file__).with_name("rank_worker.py")
STEPS = 16  # 61 users in batches of 10: 7 steps per epoch
INTERRUPT = 11  # inside the second epoch, one step after the checkpoint of step 10
TEXT = {"max_items": 6, "max_tokens": 64, "dropout": 0.2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, world: Path, teacher: Path, tiny_encoder: Path) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    encoder = {"encoder": {"path": str(tiny_encoder)}}
    backbone = {"backbone": {"name": "sasrec", "dim": 16, "max_length": 12, "dropout": 0.2}}
    systems: dict[str, dict[str, Any]] = {
        "stage1": {"name": "recformer", **TEXT},
        "pretrain": {"name": "recformer_pretrain", **TEXT},
        "a_llmrec": {"name": "a_llmrec_stage1", "teacher": str(teacher), "max_tokens": 32, "dropout": 0.2},
        "align": {"name": "ctrl_align", "adapter": "linear", **backbone},
    }

    def scenario(name: str, label: str, zero: int, micro: int | None = None, **more: Any) -> dict[str, Any]:
        train = {"max_steps": STEPS, "save_every": 2, "micro_batch_size": micro, "keep_checkpoints": 20, "epochs": 3}
        config = text_config(world, folder / label, systems[name] | encoder, **train)
        config["engine"] |= {"deepspeed": f"zero{zero}"}
        return {"name": label, "config": config, **more}

    one = [scenario(name, f"{name}-one", 0) for name in systems]
    one += [scenario("pretrain", "pretrain-micro", 1, 3)]
    one += [scenario("stage1", "stage1-cut", 0, interrupt=INTERRUPT), scenario("stage1", "stage1-cut", 0)]
    two = [scenario(name, f"{name}-two", 1) for name in systems]
    two += [scenario("stage1", "stage1-zero3", 3, interrupt=INTERRUPT), scenario("stage1", "stage1-zero3", 3)]
    two += [scenario("pretrain", "pretrain-zero3", 3)]
    for ranks, scenarios in ((1, one), (2, two)):
        listing = folder / f"{ranks}.scenarios"
        listing.write_text(json.dumps(scenarios))
        run_ranks(ranks, WORKER, [str(listing), str(folder / f"{ranks}.report")])
    return folder


def _report(folder: Path, name: str) -> dict[str, Any]:
    reports = [json.loads((folder / f"{ranks}.0.json").read_text()) for ranks in (1, 2)]
    found: dict[str, Any] = [report for reports_ in reports for report in reports_ if report["name"] == name][-1]
    return found


def _weights(folder: Path, name: str, step: int = STEPS) -> dict[str, np.ndarray]:
    return load_file(folder / name / "checkpoints" / f"step-{step:08d}" / "weights.safetensors")


@pytest.mark.parametrize("system", ["stage1", "pretrain", "a_llmrec", "align"])
def test_losses_and_gradients_do_not_depend_on_the_number_of_ranks(folder: Path, system: str) -> None:
    one, two = _report(folder, f"{system}-one"), _report(folder, f"{system}-two")
    assert len(one["losses"]) == STEPS
    np.testing.assert_allclose(two["losses"], one["losses"], rtol=0, atol=2e-5)
    np.testing.assert_allclose(two["grad_norms"], one["grad_norms"], rtol=2e-3, atol=1e-5)
    for metric, value in two["valid"].items():
        assert value == pytest.approx(one["valid"][metric], abs=2e-2), metric


@pytest.mark.parametrize("how", ["micro", "zero3"])
def test_micro_batches_and_zero_3_are_exact(folder: Path, how: str) -> None:
    one, other = _report(folder, "pretrain-one"), _report(folder, f"pretrain-{how}")
    np.testing.assert_allclose(other["losses"], one["losses"], rtol=0, atol=2e-5)


def test_the_item_table_changes_with_the_epoch_and_not_within_it(folder: Path) -> None:
    table = [_weights(folder, "stage1-one", step)["table.value"] for step in (2, 6, 8, 14, 16)]
    assert np.array_equal(table[0], table[1])
    assert not np.array_equal(table[1], table[2])
    assert np.array_equal(table[2], table[3])
    assert not np.array_equal(table[3], table[4])


def test_resuming_inside_an_epoch_equals_an_uninterrupted_run(folder: Path) -> None:
    whole, cut = _report(folder, "stage1-one"), _report(folder, "stage1-cut")
    assert cut["start"] == 10
    assert cut["losses"] == whole["losses"][10:]
    expected = _weights(folder, "stage1-one")
    for name, value in _weights(folder, "stage1-cut").items():
        assert np.array_equal(value, expected[name]), name


def test_the_item_table_resumes_under_zero_3(folder: Path) -> None:
    whole, cut = _report(folder, "stage1-one"), _report(folder, "stage1-zero3")
    assert cut["start"] == 10
    np.testing.assert_allclose(cut["losses"], whole["losses"][10:], rtol=0, atol=5e-5)
