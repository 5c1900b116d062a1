"""Trackers besides TensorBoard, each by the library itself, without a network."""

from __future__ import annotations

import importlib.util
import json
import logging
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from helpers import run_command, sasrec_config, write_config

from trainer.config import ConfigError, TrackerName, parse_config
from trainer.engine.recording.trackers import Trackers
from trainer.runs.preflight import preflight


def needs(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed: make test does")


def log_twice(path: Path, name: TrackerName) -> None:
    """A run of two steps, which is resumed for a third and tested."""
    config = parse_config(sasrec_config(Path("data"), path), "test")
    path.mkdir()
    for steps in ((1, 2), (3,)):
        trackers = Trackers(path, config, [name], done_steps=steps[0] - 1)
        for step in steps:
            trackers.write(step, {"train/loss": 1 / step, "valid/HR@10": step / 10})
        trackers.validated(steps[-1], 3, {"HR@10": steps[-1] / 10}, chosen="HR@10", better=True, samples="")
        trackers.close()
    trackers = Trackers(path, config, [name], done_steps=3)
    trackers.tested(3, {"original": {"HR@10": 0.5}, "shuffled": {"HR@10": 0.25}})
    trackers.close()


@needs("mlflow")
def test_mlflow_has_one_run_with_all_points(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    log_twice(tmp_path / "mine", "mlflow")
    assert "left out" not in caplog.text
    from mlflow import MlflowClient

    client = MlflowClient()
    [experiment] = [found for found in client.search_experiments() if found.name == "llm-srec"]
    [run] = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("mine", "FINISHED")
    assert run.data.params["train.batch_size"] == "16"
    loss = {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, "train/loss")}
    assert loss == {1: 1.0, 2: 0.5, 3: 1 / 3}
    assert run.data.metrics["best/HR_at_10"] == 0.3
    assert run.data.metrics["test_shuffled/HR_at_10"] == 0.25


@needs("trackio")
def test_trackio_has_one_run_with_all_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    log_twice(tmp_path / "mine", "trackio")
    [file] = (tmp_path / "trackio").glob("*.db")
    with closing(sqlite3.connect(file)) as base:
        rows = base.execute("select run_name, step, metrics from metrics order by id").fetchall()
    assert len({name for name, _, _ in rows}) == 1
    points = [(step, json.loads(metrics)) for _, step, metrics in rows]
    assert {step: found["train/loss"] for step, found in points if "train/loss" in found} == {1: 1.0, 2: 0.5, 3: 1 / 3}
    assert (3, {"best/HR@10": 0.3}) in points
    assert (3, {"test_original/HR@10": 0.5, "test_shuffled/HR@10": 0.25}) in points


@needs("wandb")
@pytest.mark.process
def test_a_training_is_logged_offline(tmp_path: Path, world: Path) -> None:
    config = sasrec_config(world, tmp_path / "run", epochs=1) | {}
    config["train"]["trackers"] = ["wandb"]
    preset = write_config(tmp_path / "preset.yaml", config)
    done = run_command("launchers/train.py", preset, env={"WANDB_MODE": "offline"})
    assert done.returncode == 0, done.stderr
    assert "left out" not in done.stderr
    number = json.loads((tmp_path / "run/trackers.json").read_text())["wandb"]
    files = list((tmp_path / "run/wandb").glob(f"offline-run-*-{number}/run-{number}.wandb"))
    assert files
    assert any(b"valid/NDCG@10" in file.read_bytes() for file in files)
    assert not list((tmp_path / "run").glob("events*")), "TensorBoard was not asked for"


def test_a_tracker_that_is_not_installed_is_refused(world: Path, tmp_path: Path) -> None:
    absent = next((name for name in ("wandb", "mlflow", "trackio") if importlib.util.find_spec(name) is None), None)
    if absent is None:
        pytest.skip("all are installed")
    config = parse_config(sasrec_config(world, tmp_path / "run", trackers=[absent]), "test")
    with pytest.raises(ConfigError, match=rf"{absent} is not installed: pip install 'llm-srec-trainer\[{absent}\]'"):
        preflight(config, 1)


def test_a_tracker_that_fails_costs_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A server that cannot be reached, or a full disk."""
    config = parse_config(sasrec_config(Path("data"), tmp_path), "test")
    trackers = Trackers(tmp_path, config, ["tensorboard"], done_steps=0)

    def fail(*_: object) -> None:
        raise ConnectionError("no route to host")

    [board] = trackers._open.values()
    monkeypatch.setattr(board, "write", fail)
    with caplog.at_level(logging.WARNING, "trainer"):
        for step in (1, 2):
            trackers.write(step, {"train/loss": 1.0})
    lines = [record.message for record in caplog.records]
    assert lines == ["tensorboard is left out from now on (ConnectionError: no route to host); training continues"]
    trackers.close()
