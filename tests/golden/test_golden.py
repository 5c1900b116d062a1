"""Runs of an earlier version resume and reach the numbers of that version: see README.md beside this file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers import LLM_SYSTEMS, llm4rec_config, run_command, sasrec_config

from trainer.config import config_hash, load_config, parse_config
from trainer.config.presets import PRESETS
from trainer.data.reading.dataset import open_dataset
from trainer.models import build_system
from trainer.nn.saved_buffers import saved_buffers

FOLDER = Path(__file__).parent
EXPECTED: dict[str, Any] = json.loads((FOLDER / "expected.json").read_text())


@pytest.mark.parametrize("name", EXPECTED["config_hashes"])
def test_config_hashes_of_presets_are_unchanged(name: str) -> None:
    """Runs resume only checkpoints with an equal config hash, so a new setting must not change it at its default."""
    [preset] = PRESETS.rglob(f"{name}.yaml")
    assert config_hash(load_config(preset)) == EXPECTED["config_hashes"][name]


@pytest.mark.process
@pytest.mark.parametrize("name", EXPECTED["runs"])
def test_a_checkpoint_resumes_as_before(name: str, tmp_path: Path) -> None:
    run = Path(shutil.copytree(FOLDER / name, tmp_path / name))
    for step in ("step-00000004", "step-00000006"):  # newer than 3; step 6 is the best one, which a teacher needs
        shutil.rmtree(run / "checkpoints" / step, ignore_errors=True)
    words = [f"output={run}", f"data.path={FOLDER / 'dataset'}"]
    if name == "llm_srec":
        words += [f"system.teacher={FOLDER / 'sasrec'}", f"system.llm.path={FOLDER / 'llm'}"]
    done = run_command("launchers/train.py", run / "config.yaml", *words)
    assert done.returncode == 0, done.stderr
    assert "resuming from step 3" in done.stderr
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for kind in ("loss", "grad_norm"):
        found = {str(r["step"]): r[f"train/{kind}"] for r in records if f"train/{kind}" in r}
        # CPUs round differently; on the machine that wrote the files, the numbers are equal.
        assert found == pytest.approx(EXPECTED["runs"][name][kind], rel=1e-4), kind
    for step, metrics in EXPECTED["runs"][name]["valid"].items():
        [record] = [r for r in records if "valid/MRR" in r and str(r["step"]) == step]
        assert {key: record[f"valid/{key}"] for key in metrics} == pytest.approx(metrics, abs=0.02)


@pytest.mark.parametrize("name", EXPECTED["tensors"])
def test_tensors_of_checkpoints_are_unchanged(
    name: str, world: Path, teacher: Path, stage1: Path, tiny_encoder: Path, tiny_llm: Path, tmp_path: Path
) -> None:
    """Renaming a module would make every earlier checkpoint unreadable."""
    if name in LLM_SYSTEMS:
        runs = {"teacher": teacher, "stage1": stage1}
        tree = llm4rec_config(name, world, tmp_path, tiny_llm, runs)
    else:
        encoder, sizes = {"encoder": {"path": str(tiny_encoder)}}, {"dim": 16, "max_length": 12}
        sections: dict[str, dict[str, Any]] = {
            "gru4rec": {"layers": 2},
            "nextitnet": {"dilations": [1, 2]},
            "a_llmrec_stage1": encoder | {"teacher": str(teacher), "latent_dim": 12, "max_tokens": 32},
            "ctrl": encoder | {"backbone": {"name": "sasrec", **sizes}},
            "ctrl_align": encoder | {"backbone": {"name": "sasrec", **sizes}},
            "recformer_pretrain": encoder | {"max_tokens": 96, "max_items": 6},
            "recformer": encoder | {"max_tokens": 96, "max_items": 6},
        }
        tree = sasrec_config(world, tmp_path) | {"system": {"name": name} | sections.get(name, sizes)}
    model = build_system(parse_config(tree, name), open_dataset(world, full_check=False)).model
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert sorted(trained | set(saved_buffers(model))) == EXPECTED["tensors"][name]
