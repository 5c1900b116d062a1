"""Saves that fail or are cut short: no checkpoint is lost but the one being written, and the run ends the same."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_checks import assert_same_end, newest_step
from fault_rank import Fault, Preset, start_ranks

from trainer.runs.folder import RunFolder, read_checkpoint


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    yield disk
    if disk.is_mount():
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_full_disk_costs_one_checkpoint(tmp_path: Path, small_disk: Path, preset: Preset, undisturbed: Path) -> None:
    run, filler = small_disk / "run", small_disk / "filler"
    words = [str(preset(run, save_every=3))]
    # The disk is full when step 6 is saved and has room again before the validation at step 7.
    faults = [Fault(0, 5, "data", f"fill {filler}"), Fault(0, 7, "data", f"remove {filler}")]
    ranks = start_ranks(tmp_path / "ranks", words, faults)
    assert ranks.wait() == [0, 0], ranks.all_said
    assert ranks.said(0).count("could not be written") == 1
    assert "the checkpoint of step 6 could not be written (" in ranks.said(0)
    assert "(checkpoints of steps: 3, 4)" in ranks.said(0)
    assert_same_end(run, undisturbed)


def test_a_file_system_that_is_gone_ends_the_run(tmp_path: Path, small_disk: Path, preset: Preset) -> None:
    """Rather than going on below the mount point, where nothing would be found once it is mounted again."""
    words = [str(preset(small_disk / "run", save_every=3))]
    ranks = start_ranks(tmp_path / "ranks", words, [Fault(0, 5, "data", f"unmount {small_disk}")])
    assert ranks.wait() == [2, 3], ranks.all_said
    assert f"error: the file system of {small_disk}/run is no longer mounted" in ranks.said(0)
    assert not (small_disk / "run/checkpoints").exists()


def test_killed_inside_saves(tmp_path: Path, preset: Preset, undisturbed: Path) -> None:
    """Killed before a file is on disk, before the folder has its name, and before `best.json` names it."""
    run = tmp_path / "run"
    words = [str(preset(run, save_every=2)), "engine.timeout=6"]
    for number, (step, sync, left) in enumerate([(2, 1, 0), (4, 5, 2), (7, 7, 7)]):
        ranks = start_ranks(tmp_path / f"ranks{number}", words, [Fault(0, step, f"sync {sync}", "SIGKILL")])
        assert ranks.wait()[0] == -9, ranks.all_said
        assert newest_step(run) == left, f"killed at sync {sync} of step {step}"
    ranks = start_ranks(tmp_path / "last", words)
    assert ranks.wait() == [0, 0], ranks.all_said
    assert "resuming from step 7" in ranks.said(0)
    assert not list((run / "checkpoints").glob(".*"))
    assert_same_end(run, undisturbed)


def test_killed_while_an_old_checkpoint_is_removed(tmp_path: Path, preset: Preset, undisturbed: Path) -> None:
    """What is left of it no longer counts as a checkpoint."""
    run = tmp_path / "run"
    words = [str(preset(run, save_every=2, keep_checkpoints=2)), "engine.timeout=6"]
    ranks = start_ranks(tmp_path / "ranks", words, [Fault(0, 6, "remove 1", "SIGKILL")])
    assert ranks.wait()[0] == -9, ranks.all_said
    found = RunFolder(run)
    assert [read_checkpoint(found.step_path(step)).progress.step for step in found.steps()] == [4, 6]
    ranks = start_ranks(tmp_path / "last", words)
    assert ranks.wait() == [0, 0], ranks.all_said
    assert not list((run / "checkpoints").glob(".*"))
    assert_same_end(run, undisturbed)


def test_killed_after_a_checkpoint_by_time(tmp_path: Path, preset: Preset, undisturbed: Path) -> None:
    """One rank pauses for longer than the interval; nothing else would save step 5 or 6."""
    run = tmp_path / "run"
    words = [str(preset(run, save_every=None, save_minutes=0.02)), "engine.timeout=6"]
    faults = [Fault(1, 5, "data", "sleep 1.5"), Fault(0, 7, "data", "SIGKILL")]
    ranks = start_ranks(tmp_path / "ranks", words, faults)
    assert ranks.wait() == [-9, 3], ranks.all_said
    assert newest_step(run) in (5, 6)
    ranks = start_ranks(tmp_path / "last", [*words, "train.save_minutes=5"])
    assert ranks.wait() == [0, 0], ranks.all_said
    assert_same_end(run, undisturbed)
