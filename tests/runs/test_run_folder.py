"""Run folders: finding checkpoints, and rejecting damaged ones."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest

from shards.manifest import file_sha256
from trainer.config import ConfigError, dump_config, parse_config
from trainer.runs.folder import (
    FILES,
    MOMENTS,
    STATE,
    WEIGHTS,
    CheckpointError,
    Identity,
    Progress,
    RunFolder,
    files_json,
    read_checkpoint,
    state_json,
)

IDENTITY = Identity("sasrec", "0123456789ab", "dataset", "catalog", built_on={"teacher": "0f"})


def progress(step: int) -> Progress:
    return Progress(step=step, validations=3, stale=1, best_step=5, best_value=0.25, world_size=2)


def write(run: RunFolder, step: int) -> Path:
    """Write a checkpoint in the engine's layout; the tensors' bytes do not matter here."""
    path = run.step_path(step)
    path.mkdir(parents=True)
    (path / WEIGHTS).write_bytes(f"weights {step}".encode() * 200_000)  # more than one chunk
    (path / MOMENTS).write_bytes(f"moments {step}".encode())
    (path / STATE).write_text(state_json(progress(step), IDENTITY))
    (path / FILES).write_text(files_json({name: file_sha256(path / name) for name in (WEIGHTS, MOMENTS, STATE)}))
    return path


def flip(file: Path, place: int = -1) -> None:
    damaged = bytearray(file.read_bytes())
    damaged[place] ^= 1
    file.write_bytes(damaged)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """Three checkpoints."""
    folder = RunFolder(tmp_path / "run")
    for step in (5, 100_000_000, 20):
        write(folder, step)
    return folder


def test_read_back(run: RunFolder) -> None:
    checkpoint = read_checkpoint(run.step_path(20))
    assert checkpoint.progress == progress(20)
    assert checkpoint.identity == IDENTITY
    assert checkpoint.weights.read_bytes().startswith(b"weights 20")
    assert checkpoint.moments.read_bytes() == b"moments 20"
    assert checkpoint.weights_sha256 == file_sha256(checkpoint.weights)


def test_a_run_that_never_validated_is_read_back(tmp_path: Path) -> None:
    """Its best value is minus infinity."""
    path = write(RunFolder(tmp_path), 1)
    (path / STATE).write_text(state_json(Progress(step=1), IDENTITY))
    (path / FILES).write_text(files_json({name: file_sha256(path / name) for name in (WEIGHTS, MOMENTS, STATE)}))
    assert read_checkpoint(path).progress == Progress(step=1)


def test_sha256_of_known_text(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert file_sha256(tmp_path / "file") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.parametrize("name", [WEIGHTS, MOMENTS, STATE])
@pytest.mark.parametrize("place", [0, -1])
def test_a_flipped_byte_is_named(run: RunFolder, name: str, place: int) -> None:
    file = run.step_path(20) / name
    flip(file, place)
    with pytest.raises(CheckpointError, match=f"{file} is damaged"):
        read_checkpoint(run.step_path(20))


@pytest.mark.parametrize("name", [WEIGHTS, MOMENTS, STATE])
def test_a_missing_file_is_named(run: RunFolder, name: str) -> None:
    file = run.step_path(20) / name
    file.unlink()
    with pytest.raises(CheckpointError, match=f"{file} is missing"):
        read_checkpoint(run.step_path(20))


@pytest.mark.parametrize(
    "text", [None, "", "{", "[]", "3", "null", "{}", "[" * 100_000, '{"weights.safetensors": "00"}', "\udcff"]
)
def test_an_unfinished_list_of_files(run: RunFolder, text: str | None) -> None:
    """`files.json` is written last; a checkpoint without all of it was never finished."""
    path = run.step_path(20)
    (path / FILES).unlink()
    if text is not None:
        (path / FILES).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=f"{path} has no readable files.json"):
        read_checkpoint(path)


@pytest.mark.parametrize("text", ["{}", "[]", '{"progress": {"steps": 3}, "identity": {}}', "{"])
def test_a_state_of_a_different_version(run: RunFolder, text: str) -> None:
    path = run.step_path(20)
    (path / STATE).write_text(text)
    (path / FILES).write_text(files_json({name: file_sha256(path / name) for name in (WEIGHTS, MOMENTS, STATE)}))
    with pytest.raises(CheckpointError, match=f"{path / STATE} was written by a different version"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("progress", "step", "3"), ("progress", "step", -1), ("progress", "step", 10**30), ("progress", "stale", None),
        ("progress", "best_value", "x"), ("progress", "started", []), ("identity", "config_hash", 3),
        ("identity", "built_on", {"teacher": 3}), ("identity", "llm", None),
    ],
)  # fmt: skip
def test_a_state_of_other_types(run: RunFolder, part: str, field: str, value: object) -> None:
    path = run.step_path(20)
    state = json.loads((path / STATE).read_text())
    state[part][field] = value
    (path / STATE).write_text(json.dumps(state))
    (path / FILES).write_text(files_json({name: file_sha256(path / name) for name in (WEIGHTS, MOMENTS, STATE)}))
    with pytest.raises(CheckpointError, match=rf"{STATE} is damaged \(.*: Input should be .*\); resume"):
        read_checkpoint(path)


def test_steps_are_numbers_not_names(run: RunFolder) -> None:
    """Other entries that people and killed runs leave in the folder are not checkpoints."""
    for name in ("step-00000021.bak", "step-last", ".writing-step-00000022", "notes"):
        (run.checkpoints / name).mkdir()
    assert run.steps() == [5, 20, 100_000_000]
    assert RunFolder(run.path / "nothing").steps() == []


def test_newest(run: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        found = run.newest()
    assert found is not None
    assert found.progress.step == 100_000_000
    assert caplog.text == ""


def test_an_older_checkpoint_is_used_and_the_damage_logged(run: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    flip(run.step_path(100_000_000) / MOMENTS)
    with caplog.at_level(logging.WARNING):
        found = run.newest()
    assert found is not None
    assert found.progress.step == 20
    assert str(run.step_path(100_000_000) / MOMENTS) in caplog.text
    (run.step_path(20) / WEIGHTS).unlink()
    found = run.newest()
    assert found is not None
    assert found.progress.step == 5


def test_all_damaged(run: RunFolder) -> None:
    for step in run.steps():
        flip(run.step_path(step) / WEIGHTS)
    with pytest.raises(CheckpointError, match=f"every checkpoint of {run.path} is damaged.*step-100000000"):
        run.newest()


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    assert RunFolder(tmp_path / "nothing").newest() is None
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert RunFolder(tmp_path / "run").newest() is None


def test_best(run: RunFolder) -> None:
    with pytest.raises(CheckpointError, match="no best checkpoint yet"):
        run.best()
    (run.checkpoints / "best.json").write_text(run.best_json(5))
    assert run.best().progress.step == 5
    flip(run.step_path(5) / STATE)
    with pytest.raises(CheckpointError, match=str(run.step_path(5) / STATE)):
        run.best()
    shutil.rmtree(run.step_path(5))
    with pytest.raises(CheckpointError, match="step-00000005"):
        run.best()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "[" * 100_000, '{"step": "x"}', '{"step": 5}'])
def test_a_damaged_marker_of_the_best(run: RunFolder, text: str) -> None:
    (run.checkpoints / "best.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"best\.json is damaged"):
        run.best()


def test_the_configuration_of_a_run(run: RunFolder) -> None:
    with pytest.raises(ConfigError, match="is not a run folder"):
        run.config()
    config = parse_config({"output": "o", "data": {"path": "d"}, "system": {"name": "sasrec", "dim": 8}}, "test")
    (run.path / "config.yaml").write_text(dump_config(config))
    assert run.config() == config


def test_no_byte_of_a_checkpoint_can_change_unnoticed(run: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    """Each byte of each file, flipped or missing: the damage is logged and the previous checkpoint is used."""
    path = run.step_path(100_000_000)
    (path / WEIGHTS).write_bytes(b"weights")
    (path / FILES).write_text(files_json({name: file_sha256(path / name) for name in (WEIGHTS, MOMENTS, STATE)}))
    newest = run.newest()
    assert newest is not None
    assert newest.path == path, "intact before"
    for file in (path / name for name in (WEIGHTS, MOMENTS, STATE, FILES)):
        whole = file.read_bytes()
        for place in range(len(whole)):
            changed = bytearray(whole)
            changed[place] ^= 1 << place % 8
            for damaged in (bytes(changed), whole[:place] + whole[place + 1 :]):
                file.write_bytes(damaged)
                caplog.clear()
                found = run.newest()
                assert found is not None
                assert found.progress.step == 20, f"{file} {place}"
                assert str(path) in caplog.text
        file.write_bytes(whole)
