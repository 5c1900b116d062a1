"""A dataset or a run folder that is replaced or removed while the run uses it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from fault_checks import newest_step, wait_for
from fault_rank import Fault, Preset, start_ranks
from helpers import build_world, run_command

from shards.manifest import read_manifest
from trainer.reports.results import read


@pytest.fixture
def other_world(world: Path, tmp_path: Path) -> Path:
    """Different reviews in files of the same names, with as many users and items in each."""
    other = build_world(tmp_path / "other", users=61, seed=1)
    layouts = [
        (manifest.num_items, [(shard.name, shard.users) for shard in manifest.shards])
        for manifest in map(read_manifest, (world, other))
    ]
    assert layouts[0] == layouts[1]
    return other


@pytest.mark.parametrize(
    ("at", "step", "file"), [("data", 2, "shard-00000"), ("test 1", 14, "candidates/retrieval-")], ids=["step", "test"]
)
def test_a_replaced_dataset_ends_the_run(
    tmp_path: Path, world: Path, other_world: Path, preset: Preset, at: str, step: int, file: str
) -> None:
    run, data = tmp_path / "run", shutil.copytree(world, tmp_path / "data")
    start = [str(preset(run, validate_every=9)), f"data.path={data}"]
    ranks = start_ranks(tmp_path / "ranks", start, [Fault(0, step, at, f"replace {data} {other_world}")], ranks=1)
    assert ranks.wait() == [2], ranks.all_said
    assert f"error: {data}/{file}" in ranks.said(0)
    assert "was replaced or damaged since the dataset was opened" in ranks.said(0)
    assert not (run / "results.jsonl").exists()
    # The cure.
    shutil.rmtree(data)
    shutil.copytree(world, data)
    again = start_ranks(tmp_path / "again", start, ranks=1)
    assert again.wait() == [0], again.all_said


def test_a_run_whose_folder_was_removed_can_be_opened(tmp_path: Path, preset: Preset) -> None:
    """Removed after its best checkpoint so far, at step 4, while rank 1 is not told."""
    run = tmp_path / "run"
    words = [str(preset(run, save_every=6))]
    ranks = start_ranks(tmp_path / "ranks", words, [Fault(0, 5, "data", f"remove {run}")])
    assert ranks.wait() == [0, 0], ranks.all_said
    warning = f"{run} was removed while it trained: it is made again, without its checkpoints so far"
    assert ranks.said(0).count(warning) == 1
    assert warning in (run / "log.txt").read_text()
    assert newest_step(run) == 14
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert min(steps) == 7
    assert list(run.glob("events.out.tfevents.*"))
    evaluated = run_command("launchers/evaluate.py", run)
    assert evaluated.returncode == 0, evaluated.stderr
    assert len(read(run / "results.jsonl")) == 3


def test_a_run_whose_folder_was_given_to_another_run_ends(tmp_path: Path, preset: Preset) -> None:
    """The folder is removed to start over, but the first run was not ended before."""
    run, go = tmp_path / "run", tmp_path / "go"
    first = start_ranks(tmp_path / "first", [str(preset(run))], [Fault(0, 6, "data", f"wait {go}")])
    wait_for(first, "step 5/14")
    shutil.rmtree(run)
    second = start_ranks(tmp_path / "second", [str(preset(run))], [Fault(0, 6, "data", f"wait {go}2")])
    wait_for(second, "step 5/14")
    go.touch()
    assert first.wait(60) == [2, 3], first.all_said
    assert "error: this run's folder was removed while it trained: " in first.said(0)
    assert f"{run} is being trained by process {second.processes[0].pid} on" in first.said(0)
    Path(f"{go}2").touch()
    assert second.wait(60) == [0, 0], second.all_said
