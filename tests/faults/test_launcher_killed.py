"""`kill -9` of what started the ranks: they save, stop, and leave the run folder free."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fault_checks import children, newest_step
from helpers import ROOT, sasrec_config, write_config

from benchmarks.common.ranks import environments
from trainer.runs.folder import RunFolder
from trainer.runs.launch_env import free_port
from trainer.runs.lock import check_not_locked

Start = Callable[..., "subprocess.Popen[bytes]"]

TRAIN = ROOT / "launchers/train.py"
_LAUNCHER = "import subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]])"
"""A launcher of one rank in one line; ranks of Slurm and torchrun have such a parent, too."""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a process whose descendants do not outlive the test."""
    started: list[subprocess.Popen[bytes]] = []

    def run(*words: str | Path, **environment: str) -> subprocess.Popen[bytes]:
        with (tmp_path / "out").open("wb") as out:
            environment = {**os.environ, **environment}
            started.append(subprocess.Popen(words, env=environment, stdout=out, stderr=out, start_new_session=True))
        return started[-1]

    yield run
    for process in started:
        for left in sessions(process.pid):
            os.kill(left, signal.SIGKILL)
        process.wait()


def sessions(leader: int) -> list[int]:
    """Processes of a session that run."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, session, *_ = file.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(session) == leader and state != "Z":
            found.append(int(file.parent.name))
    return found


def endless(world: Path, run: Path) -> Path:
    """Preset of a run that does not end by itself, nor saves before it is stopped."""
    settings = {"epochs": 100_000, "validate_every": 100_000, "patience": 100_000, "save_every": 100_000}
    return write_config(run.with_suffix(".yaml"), sasrec_config(world, run, **settings))


def kill_and_wait(launcher: subprocess.Popen[bytes], run: Path) -> None:
    """Kill the launcher once the run trains; assert that all that it started ends, and has saved."""
    metrics, end = run / "metrics.jsonl", time.monotonic() + 150
    while not metrics.is_file() or not metrics.stat().st_size:
        assert time.monotonic() < end, (run.parent / "out").read_text()
        time.sleep(0.1)
    assert children(launcher.pid)
    os.kill(launcher.pid, signal.SIGKILL)
    launcher.wait()
    end = time.monotonic() + 60
    while sessions(launcher.pid):
        assert time.monotonic() < end, (run.parent / "out").read_text()
        time.sleep(0.1)
    assert newest_step(run) > 0
    assert "stopped by SIGTERM on rank" in (run / "log.txt").read_text()
    check_not_locked(RunFolder(run))


def test_a_rank_ends_with_its_parent(world: Path, tmp_path: Path, start: Start) -> None:
    words = [sys.executable, "-c", _LAUNCHER, TRAIN, endless(world, tmp_path / "run")]
    kill_and_wait(start(*words, **environments(1)[0]), tmp_path / "run")


def test_ranks_end_with_the_deepspeed_command(world: Path, tmp_path: Path, start: Start) -> None:
    """It is the parent of their parent, launch.py, which survives it."""
    words = [Path(sys.executable).parent / "deepspeed", "--num_gpus", "2", "--master_port", str(free_port()), TRAIN]
    kill_and_wait(start(*words, endless(world, tmp_path / "run")), tmp_path / "run")


def test_a_run_ends_with_the_comparison_that_started_it(world: Path, tmp_path: Path, start: Start) -> None:
    words = [sys.executable, ROOT / "launchers/compare.py", endless(world, tmp_path / "run"), f"output={tmp_path}"]
    kill_and_wait(start(*words), tmp_path / "run")


def test_a_run_without_a_launcher_outlives_its_shell(world: Path, tmp_path: Path, start: Start) -> None:
    """`nohup llm-srec train ... &`, and the end of the terminal session."""
    run = tmp_path / "run"
    preset = write_config(tmp_path / "run.yaml", sasrec_config(world, run, epochs=1))
    shell = start("bash", "-c", f"{sys.executable} {TRAIN} {preset} & sleep 1")
    assert shell.wait(60) == 0
    end = time.monotonic() + 120
    while sessions(shell.pid):
        assert time.monotonic() < end
        time.sleep(0.1)
    assert (run / "results.jsonl").is_file()
