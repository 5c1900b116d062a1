"""Every file of `ds_configs/` is loaded and stepped by the real DeepSpeed on two ranks, and trains the same run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import llm_srec_config, run_ranks
from safetensors.numpy import load_file

from trainer.config.deepspeed_json import config_names

WORKER = Path(__file__).with_name("rank_worker.py")
STEPS, CUT = 4, 2
OF_DEVICES = [name for name in config_names() if "/" in name]  # files for any device: test_ranks.py


def run_folder(folder: Path, name: str) -> Path:
    return folder / name.replace("/", "-")


@pytest.fixture(scope="module")
def outcome(
    tmp_path_factory: pytest.TempPathFactory, world: Path, teacher: Path, tiny_llm: Path
) -> tuple[Path, dict[str, Any]]:
    """The run folders, and the reports of rank 0: `zero0`, all device-specific files, and an interrupted run."""
    folder = tmp_path_factory.mktemp("ds_configs")

    def scenario(name: str, ds: str, **more: Any) -> dict[str, Any]:
        sizes = {"max_steps": STEPS, "save_every": CUT, "micro_batch_size": 3}
        config = llm_srec_config(world, run_folder(folder, name), teacher, tiny_llm, **sizes)
        config["engine"]["deepspeed"] = ds
        config["evaluation"]["valid_users"] = 4
        return {"name": name, "config": config, **more}

    offload = "a6000/zero3_offload"
    listing = [scenario(name, name) for name in ("zero0", *OF_DEVICES)]
    listing += [scenario("cut", offload, interrupt=CUT + 1), scenario("cut", offload)]
    (folder / "scenarios").write_text(json.dumps(listing))
    run_ranks(2, WORKER, [str(folder / "scenarios"), str(folder / "report")])
    return folder, {report["name"]: report for report in json.loads((folder / "report.0.json").read_text())}


def weights(folder: Path, name: str) -> dict[str, np.ndarray]:
    return load_file(run_folder(folder, name) / f"checkpoints/step-{STEPS:08d}/weights.safetensors")


def moments(folder: Path, name: str) -> dict[str, np.ndarray]:
    return load_file(run_folder(folder, name) / f"checkpoints/step-{STEPS:08d}/moments.safetensors")


def test_the_files_of_each_device_exist() -> None:
    assert {name.split("/")[0] for name in OF_DEVICES} == {"a6000", "gaudi"}
    assert config_names()[:4] == ["zero0", "zero1", "zero2", "zero3"]


@pytest.mark.parametrize("name", OF_DEVICES)
def test_a_file_trains_the_same_run(outcome: tuple[Path, dict[str, Any]], name: str) -> None:
    folder, reports = outcome
    np.testing.assert_allclose(reports[name]["losses"], reports["zero0"]["losses"], rtol=0, atol=2e-6)
    assert reports[name]["frozen"] in ({}, reports["zero0"]["frozen"])  # empty where ZeRO-3 has split them
    found, expected = moments(folder, name), moments(folder, "zero0")
    assert found.keys() == expected.keys()
    for key in found:
        np.testing.assert_allclose(found[key], expected[key], rtol=0, atol=2e-6, err_msg=key)


def test_a_run_with_offloaded_weights_resumes_exactly(outcome: tuple[Path, dict[str, Any]]) -> None:
    folder, reports = outcome
    assert reports["cut"]["start"] == CUT
    assert reports["cut"]["losses"] == reports["a6000/zero3_offload"]["losses"][CUT:]
    expected = weights(folder, "a6000/zero3_offload")
    assert all(np.array_equal(value, expected[key]) for key, value in weights(folder, "cut").items())
