"""`launchers/plan.py` as a person would run it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from helpers import llm_srec_config, run_command, sasrec_config, write_config

PLAN = "launchers/plan.py"


def test_a_plan_needs_neither_teacher_nor_weights(world: Path, tiny_llm: Path, tmp_path: Path) -> None:
    bare = tmp_path / "llm"
    bare.mkdir()
    for file in tiny_llm.glob("*.json"):
        shutil.copy(file, bare)
    preset = write_config(tmp_path / "run.yaml", llm_srec_config(world, tmp_path / "out", tmp_path / "no", bare))
    words = (PLAN, preset, "--devices", "2", "--kind", "h200")
    done = run_command(*words, "system.llm.dtype=bfloat16")
    assert done.returncode == 0, done.stderr
    assert "2 x NVIDIA H200" in done.stdout
    assert "Recommended: train.micro_batch_size=null engine.deepspeed=zero1" in done.stdout

    plan = json.loads(run_command(*words, "--json", "train.batch_size=12").stdout)
    assert plan["llm"]["layers"] == 3
    assert plan["steps_per_epoch"] == -(-61 // 12)
    assert plan["as_configured"]["fits"]
    assert plan["useful_tokens"] > plan["trained_tokens"] > 0
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_planned_is_one_line(world: Path, tiny_llm: Path, tmp_path: Path) -> None:
    tree = llm_srec_config(world, tmp_path / "out", tmp_path / "no", tiny_llm)
    preset = write_config(tmp_path / "run.yaml", tree)
    for words, cure in (
        (("--devices", "11", "--kind", "h200"), "11 devices cannot share a batch of 10 users"),
        (("--kind", "gaudi2"), "set system.llm.dtype=bfloat16"),
        (("--kind", "h200", f"system.llm.path={tmp_path}"), "config.json does not exist"),
    ):
        done = run_command(PLAN, preset, *words)
        assert done.returncode == 2
        assert cure in done.stderr
        assert done.stderr.count("\n") == 1


def test_a_system_without_an_llm_needs_no_plan(world: Path, tmp_path: Path) -> None:
    preset = write_config(tmp_path / "run.yaml", sasrec_config(world, tmp_path / "out"))
    done = run_command(PLAN, preset, "--kind", "a6000")
    assert done.returncode == 0
    assert "any device holds it" in done.stdout
