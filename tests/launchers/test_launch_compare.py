"""`launchers/compare.py`: several systems with one command, by real runs on the synthetic dataset."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, llm_srec_config, run_command, sasrec_config, write_config
from launch_helpers import Refused, contents

from launchers.compare import main
from trainer.config import ConfigError, load_config
from trainer.reports.results import read
from trainer.runs.folder import RunFolder
from trainer.workflows.comparing.comparison import compared_runs

pytestmark = pytest.mark.process


@pytest.fixture
def presets(tmp_path: Path, world: Path, tiny_llm: Path) -> dict[str, Path]:
    """LLM-SRec, its teacher, another SASRec, a system that cannot run and one that builds on it; by name."""
    own = tmp_path / "own"
    trees = {
        "llm_srec": llm_srec_config(world, own / "llm_srec", own / "sasrec", tiny_llm, epochs=1, validate_every=1),
        "sasrec": sasrec_config(world, own / "sasrec"),
        "wide": sasrec_config(world, own / "wide", epochs=1) | {"system": {"name": "sasrec", "dim": 24}},
        "homeless": llm_srec_config(world, own / "homeless", own / "sasrec", tmp_path / "no" / "llm" / "here"),
        "orphan": llm_srec_config(world, own / "orphan", own / "homeless", tiny_llm),
    }
    return {name: write_config(tmp_path / f"{name}.yaml", tree) for name, tree in trees.items()}


def errors(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if " failed: " in line or line.startswith("error: ")]


def ran(stderr: str) -> list[str]:
    """Systems whose training logged its start, in order."""
    return [line.split()[1] for line in stderr.splitlines() if " trained parameters, " in line]


def test_the_whole_comparison_twice(presets: dict[str, Path], teacher: Path, tmp_path: Path) -> None:
    """Teachers train first, a failure stops only what builds on it, one table; finished runs are not repeated."""
    out = tmp_path / "together"
    shutil.copytree(teacher, out / "sasrec")
    overrides: list[str | Path] = [
        *(presets[name] for name in ("llm_srec", "orphan", "homeless", "wide", "sasrec")),
        f"output={out}",
    ]
    files = [tmp_path / "table.md", tmp_path / "new" / "results.json"]
    first = run_command("launchers/compare.py", *overrides, "--out", files[0], "--out", files[1])
    assert first.returncode == 2
    assert ran(first.stderr) == ["sasrec", "llm_srec"]
    said = [line for line in first.stderr.splitlines() if line.startswith("== ")]
    assert said == [
        f"== {n}/5 {name}: {out / name}"
        for n, name in enumerate(("wide", "sasrec", "llm_srec", "homeless", "orphan"), 1)
    ]
    assert errors(first.stderr)[-3:] == [
        f"homeless failed: system.llm.path={tmp_path}/no/llm/here is not a language model: there is no such folder; "
        "set system.llm.path to a folder with config.json, safetensors weights and a tokenizer",
        "orphan failed: not started because it builds on homeless, which failed",
        "error: 2 of 5 systems failed: fix them and run the same command again",
    ]
    assert not (out / "orphan").exists()
    assert load_config(out / "llm_srec" / "config.yaml").system.teacher == out / "sasrec"  # type: ignore[union-attr]
    assert not (tmp_path / "own").exists()

    record = {run["name"]: run for run in json.loads(files[1].read_text())}
    assert [len(record[name]["results"]) for name in ("wide", "sasrec", "llm_srec", "homeless")] == [2, 2, 2, 0]
    value = {
        name: {r["history"]: r["metrics"]["NDCG@10"] for r in record[name]["results"]}
        for name in ("wide", "sasrec", "llm_srec")
    }
    best_first = sorted(value, key=lambda name: -value[name]["original"]["value"])
    for text in (first.stdout, files[0].read_text()):
        rows = [line for line in text.splitlines() if line.lstrip("| ").startswith(("sasrec", "llm_srec"))]
        labels = [{"wide": "sasrec (wide)"}.get(name, name) for name in best_first]
        assert [re.split(r"  | \|", row.lstrip("| "))[0] for row in rows[:3]] == labels
        assert "sasrec (wide): system.dim=24, " in text
        for name, row in zip(best_first, rows[:3], strict=True):
            original, shuffled = value[name]["original"], value[name]["shuffled"]
            half = max(original["high"] - original["value"], original["value"] - original["low"])
            assert f"{original['value']:.4f} ±" in row
            assert f"{shuffled['value']:.4f}" in row
            assert 0 < half < 0.2

    before = contents(out)
    second = run_command("launchers/compare.py", *overrides, "--json")
    assert second.returncode == 2
    assert ran(second.stderr) == []
    assert errors(second.stderr)[-3:] == errors(first.stderr)[-3:]
    assert json.loads(second.stdout) == json.loads(files[1].read_text())
    assert contents(out) == before

    # More epochs give more to do to the system that they are set for, and to no other.
    more = [*overrides, "wide:train.epochs=2"]
    dry = run_command("launchers/compare.py", *more, "--dry-run")
    assert dry.returncode == 0
    states = dict(line.split()[1:2] + [line.split(": ", 1)[1]] for line in dry.stdout.splitlines())
    assert states["wide"] == "resumes from step 4"
    assert states["sasrec"] == states["llm_srec"] == "done"
    assert states["homeless"].startswith("cannot run: system.llm.path=")
    assert states["orphan"] == "trains after homeless"
    assert contents(out) == before


def test_several_ranks(presets: dict[str, Path], tmp_path: Path) -> None:
    done = run_command("launchers/compare.py", presets["wide"], "--ranks", "2")
    assert done.returncode == 0, done.stderr
    assert ", 2 rank(s), " in done.stderr
    assert [r.history for r in read(tmp_path / "own" / "wide" / "results.jsonl")] == ["original", "shuffled"]


def test_a_signal_reaches_the_run_and_the_command_resumes_later(presets: dict[str, Path], tmp_path: Path) -> None:
    overrides = [str(presets["wide"]), str(presets["sasrec"]), "train.epochs=400", "train.patience=400"]
    command = [sys.executable, str(ROOT / "launchers/compare.py"), *overrides]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "DS_ACCELERATOR": "cpu"}
    ) as process:
        run = RunFolder(tmp_path / "own" / "wide")
        for _ in range(1200):
            if run.steps() or process.poll() is not None:
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert out == ""
    assert "error: stopped by SIGTERM; what ran is saved: start the same command again to resume" in err
    assert ran(err) == ["sasrec"]
    step = run.newest().progress.step  # type: ignore[union-attr]
    dry = run_command("launchers/compare.py", *overrides, "--dry-run")
    assert f"own/wide: resumes from step {step}\n" in dry.stdout
    assert dry.stdout.endswith("own/sasrec: trains\n")


def test_an_evaluation_of_an_unfinished_run_does_not_make_it_done(
    presets: dict[str, Path], teacher: Path, tmp_path: Path, world: Path
) -> None:
    """A run is done if it is over and tested at its best step, with the same settings, data and sources."""
    run = tmp_path / "run"
    shutil.copytree(teacher, run)
    preset = write_config(tmp_path / "same.yaml", sasrec_config(world, run))

    def state(*overrides: str) -> str:
        done = run_command("launchers/compare.py", preset, "--dry-run", *overrides)
        assert done.returncode == 0, done.stderr
        return done.stdout.split(": ", 1)[1].strip()

    assert state() == "done"
    assert state("train.epochs=9") == "resumes from step 12"
    assert state("train.epochs=2") == "done"
    assert state("system.dropout=0.4").startswith("cannot run: ")
    assert state("evaluation.tie=pessimistic").startswith("cannot run: ")
    (run / "results.jsonl").write_text((run / "results.jsonl").read_text().splitlines()[0] + "\n")
    assert state() == "resumes from step 12"
    assert state("evaluation.test_histories=[original]") == "done"


def test_overrides_apply_where_their_key_exists(presets: dict[str, Path], tmp_path: Path) -> None:
    overrides = ["system.llm.layers=2", "train.lr=0.5", "wide,llm_srec:train.batch_size=7", f"output={tmp_path / 'x'}"]
    runs = {run.name: run.config for run in compared_runs(list(presets.values()), overrides)}
    assert list(runs) == ["sasrec", "llm_srec", "wide", "homeless", "orphan"]
    assert {name: run.train.lr for name, run in runs.items()} == dict.fromkeys(runs, 0.5)
    assert [name for name, run in runs.items() if run.train.batch_size == 7] == ["llm_srec", "wide"]
    assert {runs[name].system.llm.layers for name in ("llm_srec", "homeless", "orphan")} == {2}  # type: ignore[union-attr]
    assert {name: run.output for name, run in runs.items()} == {name: tmp_path / "x" / name for name in runs}
    assert runs["llm_srec"].system.teacher == tmp_path / "x" / "sasrec"  # type: ignore[union-attr]
    # A teacher that is not compared stays where it is, and so does one that the command names.
    [alone] = compared_runs([presets["llm_srec"]], [f"output={tmp_path / 'x'}"])
    assert alone.config.system.teacher == tmp_path / "own" / "sasrec"  # type: ignore[union-attr]
    both = [presets["llm_srec"], presets["sasrec"]]
    named = compared_runs(both, [f"output={tmp_path / 'x'}", f"system.teacher={tmp_path / 'mine'}"])
    assert {run.name: run for run in named}["llm_srec"].config.system.teacher == tmp_path / "mine"  # type: ignore[union-attr]


def test_what_cannot_be_compared_is_refused(presets: dict[str, Path], refused: Refused, tmp_path: Path) -> None:
    wide, srec = presets["wide"], presets["llm_srec"]
    assert "did you mean 'lr'?" in refused(main, wide, srec, "train.lrr=1")
    assert "unknown key 'system.teacher'" in refused(main, wide, "system.teacher=x")
    assert "no preset is called tall (one of: wide, llm_srec)" in refused(main, wide, srec, "tall:train.lr=1")
    assert "'train.lr'" in refused(main, wide, "train.lr=-1")
    assert "no such file" in refused(main, tmp_path / "none.yaml")
    assert "give at least one preset" in refused(main, "train.lr=1")
    assert "--ranks 0" in refused(main, wide, "--ranks", "0")
    assert "ends in .md or .json" in refused(main, wide, "--out", "table.txt")
    copy = tmp_path / "copy" / "wide.yaml"
    copy.parent.mkdir()
    shutil.copy(wide, copy)
    assert "two presets write to" in refused(main, wide, copy)
    itself = tmp_path / "itself.yaml"
    tree: dict[str, Any] = json.loads(srec.read_text())
    tree["output"] = tree["system"]["teacher"]
    assert "builds on its own output" in refused(main, write_config(itself, tree))
    with pytest.raises(ConfigError, match="missing key 'system'"):
        compared_runs([write_config(tmp_path / "odd.yaml", {"output": "x"})], [])


def test_a_dry_run_needs_no_torch(presets: dict[str, Path]) -> None:
    program = (
        "import sys, launchers.compare as compare; compare.main([*sys.argv[1:], '--dry-run']); "
        "sys.exit('torch imported' if 'torch' in sys.modules else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(presets["sasrec"]), str(presets["llm_srec"])],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [line.split(": ", 1)[1] for line in done.stdout.splitlines()] == ["trains", "trains after sasrec"]


def test_a_sweep_over_seeds_shares_the_teacher(presets: dict[str, Path], tmp_path: Path) -> None:
    """Settings of the student alone do not train its teacher again; a seed does."""
    out = f"output={tmp_path / 'swept'}"
    axes = ["llm_srec:train.lr=0.001,0.002", "seed=0,1"]
    runs = compared_runs([presets["llm_srec"], presets["sasrec"]], [out], axes)
    folders = [run.config.output.relative_to(tmp_path / "swept") for run in runs]
    assert [str(folder) for folder in folders] == [
        "sasrec/seed=0",
        "llm_srec/train.lr=0.001_seed=0",
        "sasrec/seed=1",
        "llm_srec/train.lr=0.001_seed=1",
        "llm_srec/train.lr=0.002_seed=0",
        "llm_srec/train.lr=0.002_seed=1",
    ]
    for run in runs:
        if (system := run.config.system).name == "llm_srec":
            assert getattr(system, "teacher") == tmp_path / f"swept/sasrec/seed={run.config.seed}"  # noqa: B009
    assert runs[1].name == "llm_srec train.lr=0.001 seed=0"


def test_seeds_are_run_and_summed_up(presets: dict[str, Path], tmp_path: Path) -> None:
    words: list[str | Path] = [presets["wide"], f"output={tmp_path / 'swept'}", "--seeds=2"]
    done = run_command("launchers/compare.py", *words, "--out", tmp_path / "table.md")
    assert done.returncode == 0, done.stderr
    runs = [tmp_path / f"swept/wide/seed={seed}" for seed in (0, 1)]
    values = [
        result.metrics["NDCG@10"].value
        for run in runs
        for result in read(run / "results.jsonl")
        if result.history == "original"
    ]
    assert values[0] != values[1]
    mean = f"{sum(values) / 2:.4f} (sd {abs(values[0] - values[1]) / 2**0.5:.4f})"
    assert mean in done.stdout
    assert mean in (tmp_path / "table.md").read_text()
    reported = run_command("launchers/report.py", *runs)
    assert reported.returncode == 0, reported.stderr
    assert mean in reported.stdout


def test_what_cannot_be_swept_is_refused(presets: dict[str, Path], refused: Refused) -> None:
    twice = refused(main, presets["wide"], presets["wide"])
    assert (
        twice
        == f"error: {presets['wide']} is given twice: give it once, with --seeds N or --sweep section.key=value,value\n"
    )
    assert refused(main, presets["wide"], "--seeds=0") == "error: --seeds 0: give the number of seeds\n"
    assert "write section.key=value,value" in refused(main, presets["wide"], "--sweep=train.lr")
    assert "did you mean 'lr'" in refused(main, presets["wide"], "--sweep=train.lrr=1,2")
