"""Runs that Slurm interrupts resume on their own and end with the same bits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import sasrec_config, write_config
from local_cluster import LocalCluster
from slurm_helpers import Submitted, submit

from trainer.runs.folder import RunFolder

STEPS = 600


@pytest.fixture
def preset(tmp_path: Path, world: Path) -> Path:
    """A run long enough to be interrupted in the middle."""
    config = sasrec_config(
        world, tmp_path / "run", epochs=1000, max_steps=STEPS, validate_every=100, patience=1000, save_every=STEPS
    )
    return write_config(tmp_path / "sasrec.yaml", config)


def last_step(run: Path) -> int:
    """The newest step in the run's metrics."""
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    # The last line may be half written.
    return int(json.loads(lines[-2])["step"]) if len(lines) > 1 else 0


def preempt(cluster: LocalCluster, job: Submitted, run: Path, restarts: int) -> int:
    """Signal the job as Slurm does ahead of the time limit; returns the step at which the run was saved."""
    before = RunFolder(run).steps()
    goal = (before[-1] if before else 0) + 50
    cluster.wait(lambda: last_step(run) >= goal, f"step {goal}", 120)
    cluster.run("scancel", "--batch", "--signal=USR1", job.number)
    cluster.wait(lambda: cluster.facts(job.number)["Restarts"] == str(restarts), f"restart {restarts}", 60)
    return RunFolder(run).steps()[-1]


def test_a_run_requeued_twice_ends_as_an_undisturbed_one(cluster: LocalCluster, preset: Path, tmp_path: Path) -> None:
    run, quiet = tmp_path / "run", tmp_path / "quiet"
    size = ("--nodes=2", "--per-node=1")
    undisturbed = submit(cluster, "a6000", preset, *size, f"output={quiet}")
    job = submit(cluster, "a6000", preset, *size)
    stops = [preempt(cluster, job, run, restarts) for restarts in (1, 2)]
    for each in (job, undisturbed):
        assert cluster.wait_end(each.number) == "COMPLETED", each.output()
    log = (run / "log.txt").read_text()
    assert [f"resuming from step {step}" in log for step in stops] == [True, True]
    assert 0 < stops[0] < stops[1] < STEPS
    assert "resuming" not in (quiet / "log.txt").read_text()
    ours, theirs = RunFolder(run).step_path(STEPS), RunFolder(quiet).step_path(STEPS)
    for name in ("weights.safetensors", "moments.safetensors"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    assert not (run / "requeue").exists()
    assert job.output().count("requeueing: ") == 2
