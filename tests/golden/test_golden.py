"""Runs of an earlier version resume to the numbers that it had itself: see README.md beside this file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers import run_command

from trainer.config import config_hash, load_config
from trainer.config.presets import PRESETS

FOLDER = Path(__file__).parent
EXPECTED: dict[str, Any] = json.loads((FOLDER / "expected.json").read_text())


@pytest.mark.parametrize("name", EXPECTED["config_hashes"])
def test_presets_are_the_runs_that_they_were(name: str) -> None:
    """Equal hashes may resume each other's checkpoints: a new setting must leave them as they are at its default."""
    [preset] = PRESETS.rglob(f"{name}.yaml")
    assert config_hash(load_config(preset)) == EXPECTED["config_hashes"][name]


@pytest.mark.process
@pytest.mark.parametrize("name", EXPECTED["runs"])
def test_a_checkpoint_resumes_as_before(name: str, tmp_path: Path) -> None:
    run = Path(shutil.copytree(FOLDER / name, tmp_path / name))
    for step in ("step-00000004", "step-00000006"):  # the teacher's best one
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
        # Processors round differently; on the machine that wrote the files the numbers are equal.
        assert found == pytest.approx(EXPECTED["runs"][name][kind], rel=1e-4), kind
    for step, metrics in EXPECTED["runs"][name]["valid"].items():
        [record] = [r for r in records if "valid/MRR" in r and str(r["step"]) == step]
        assert {key: record[f"valid/{key}"] for key in metrics} == pytest.approx(metrics, abs=0.02)
