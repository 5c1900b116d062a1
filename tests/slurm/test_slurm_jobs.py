"""The project's own batch scripts under a real Slurm, with ranks on CPUs."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
from helpers import ROOT, llm_srec_config, run_command, sasrec_config, write_config
from local_cluster import LocalCluster
from slurm_helpers import SMALL, losses, submit

from shards.manifest import read_manifest
from trainer.reports.results import read


@pytest.fixture
def preset(tmp_path: Path, world: Path) -> Path:
    """The `teacher` fixture's run, in another folder."""
    return write_config(tmp_path / "sasrec.yaml", sasrec_config(world, tmp_path / "run"))


def test_two_nodes_train_the_run_of_one_process(
    cluster: LocalCluster, preset: Path, teacher: Path, tmp_path: Path
) -> None:
    job = submit(cluster, "a6000", preset, "--nodes=2", "--per-node=1")
    assert cluster.wait_end(job.number) == "COMPLETED", job.output()
    run = tmp_path / "run"
    assert ", 2 rank(s), " in (run / "log.txt").read_text()
    assert cluster.facts(job.number)["NodeList"] == "node[1-2]"
    assert losses(run) == pytest.approx(losses(teacher), rel=1e-4)
    ours, theirs = read(run / "results.jsonl"), read(teacher / "results.jsonl")
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.metrics["NDCG@10"].value == pytest.approx(other.metrics["NDCG@10"].value, abs=1e-6)
        assert mine.commit == other.commit
    assert not (run / "slurm/owner").exists()


def test_a_sweep_is_a_job_array_of_the_gaudi_script(
    cluster: LocalCluster, tmp_path: Path, world: Path, teacher: Path, tiny_llm: Path
) -> None:
    config = llm_srec_config(world, tmp_path / "run", teacher, tiny_llm, max_steps=2, epochs=1)
    preset = write_config(tmp_path / "llm_srec.yaml", config)
    job = submit(cluster, "gaudi", preset, "--per-node=1", "--sweep=train.lr=0.001,0.002", "--sweep=seed=3")
    for task in ("0", "1"):
        assert cluster.wait_end(f"{job.number}_{task}") == "COMPLETED", job.output()
    runs = [tmp_path / "run" / name for name in ("train.lr=0.001_seed=3", "train.lr=0.002_seed=3")]
    assert all(len(read(run / "results.jsonl")) == 2 for run in runs)


def test_an_experiment_is_an_array_after_that_of_its_teachers(
    cluster: LocalCluster, tmp_path: Path, world: Path, tiny_llm: Path
) -> None:
    unused = tmp_path / "unused"
    trees = {
        "sasrec": sasrec_config(world, unused, epochs=1),
        "llm_srec": llm_srec_config(world, unused, unused, tiny_llm, max_steps=2, epochs=1),
    }
    files = {name: str(write_config(tmp_path / f"{name}.yaml", tree)) for name, tree in trees.items()}
    systems = {
        "sasrec": {"preset": files["sasrec"]},
        "llm_srec": {"preset": files["llm_srec"], "builds_on": {"teacher": "sasrec"}},
    }
    recipe = write_config(tmp_path / "recipe.yaml", {"title": "tiny", "systems": systems})
    words = ["--data", str(world), "--recipe", str(recipe), "--runs", str(tmp_path / "runs")]
    script = "launchers/slurm/submit.py"
    done = run_command(script, "a6000", *SMALL, "--per-node=1", "--experiment=table12", *words, env=cluster.environment)
    assert done.returncode == 0, done.stderr
    teachers, students = (line.removeprefix("job ").split(":") for line in done.stdout.splitlines())
    assert (teachers[1].split(",")[0], students[1].split(",")[0]) == (" 1 run(s)", " 2 run(s)")
    for number in range(2):
        assert cluster.wait_end(f"{students[0]}_{number}") == "COMPLETED", done.stdout
    collected = run_command("launchers/experiment.py", "table12", *words)
    assert collected.returncode == 0, collected.stderr
    assert " trained parameters, " not in collected.stderr
    assert len(list((tmp_path / "runs").glob("llm_srec-*/results.jsonl"))) == 2


def test_a_run_that_fails_is_a_failed_job(cluster: LocalCluster, preset: Path, world: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(world, tmp_path / "data"))
    job = submit(cluster, "a6000", preset, "--per-node=2", f"data.path={data}", "--sbatch=--hold")
    shutil.rmtree(data)
    cluster.run("scontrol", "release", job.number)
    assert cluster.wait_end(job.number) == "FAILED"
    # The trainer's 2, or the code of the rank that was terminated because the other had failed.
    assert cluster.facts(job.number)["ExitCode"] in {"2:0", "143:0"}
    assert job.output().count(f"error: {data} is not a dataset") == 1


def test_a_run_has_one_job_at_a_time_and_stays_cancelled(cluster: LocalCluster, preset: Path, tmp_path: Path) -> None:
    first = submit(cluster, "a6000", preset, "--per-node=1", "train.epochs=100000", "train.patience=100000")
    cluster.wait((tmp_path / "run/slurm/owner").exists, "claim of the run")
    second = submit(cluster, "gaudi", preset, "--per-node=1")
    assert cluster.wait_end(second.number) == "FAILED"
    assert f"error: job {first.number} is writing {tmp_path / 'run'}: wait for it" in second.output()
    cluster.run("scancel", first.number)
    assert cluster.wait_end(first.number) == "CANCELLED"


@pytest.mark.parametrize("kind", ["a6000", "gaudi"])
def test_slurm_takes_the_command_for_real_devices(
    cluster: LocalCluster, preset: Path, tmp_path: Path, kind: str
) -> None:
    words = ["--per-node=1", "--nodes=2", "--time=5", "--partition=main", "--sbatch=--test-only"]
    done = run_command("launchers/slurm/submit.py", kind, preset, *words, env=cluster.environment)
    assert done.returncode == 0, done.stderr
    words[-1] = "--gres=gpu:none-such:1"
    done = run_command("launchers/slurm/submit.py", kind, preset, *words, env=cluster.environment)
    assert done.returncode == 2
    assert "error: sbatch rejected the job: " in done.stderr
    assert len(list((tmp_path / "run/slurm").iterdir())) == 1, "the refused job's folder is gone"


def test_a_dataset_is_built_by_a_job(cluster: LocalCluster, world: Path, tmp_path: Path) -> None:
    _build_by_a_job(cluster, world, tmp_path)


@pytest.mark.skipif("SPARK_ON_SLURM" not in os.environ, reason="takes a minute: `make test-slurm` runs it")
def test_a_dataset_is_built_by_spark_on_two_nodes(cluster: LocalCluster, world: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyspark")
    _build_by_a_job(cluster, world, tmp_path, "--nodes=2", "--cpus-per-task=1")
    assert ": 8 parts at spark://node1:" in (tmp_path / "out").read_text()
    assert not list(Path(tempfile.gettempdir()).glob("*/spark-defaults.conf")), "the secret is gone"


def _build_by_a_job(cluster: LocalCluster, world: Path, tmp_path: Path, *nodes: str) -> None:
    raw = world.parent / "raw"
    # As in helpers.build_world.
    words = f"--source table --time-unit ms --reviews {raw}/reviews.parquet --meta {raw}/items.parquet --min-item 1 "
    words += "--min-train 3 --negatives 19 --title-negatives 5 --shards 3 --users-per-record 8 --name world"
    script = str(ROOT / "launchers/slurm/shards.sbatch")
    options = ["--parsable", "--mem=1G", *nodes, f"--chdir={tmp_path}", f"--output={tmp_path}/out"]
    options.append(f"--export=ALL,PYTHONPATH={ROOT},PYTHON={sys.executable}")
    number = cluster.run("sbatch", *options, script, str(tmp_path / "built"), *words.split()).strip()
    assert cluster.wait_end(number) == "COMPLETED", (tmp_path / "out").read_text()
    assert read_manifest(tmp_path / "built").fingerprint == read_manifest(world).fingerprint
