"""Shared by commands: how they leave, without losing what they printed, and their lines of progress."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launchers.command import show_progress
from trainer.evaluation import progress
from trainer.evaluation.progress import Progress

SCRIPT = """
import atexit, sys
sys.modules["torch"] = sys  # as if it were imported, which takes a second
from launchers.command import exit_process
class Late:
    def __del__(self): print("taken apart", file=sys.stderr)
late = Late()
atexit.register(print, "handler")
print("answer")
exit_process({code})
"""


def leave(code: int, stdout: int | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SCRIPT.format(code=code)],
        stdout=subprocess.PIPE if stdout is None else stdout,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONUNBUFFERED": ""} | environment,
        check=False,
    )


@pytest.mark.parametrize("code", [0, 130])
def test_everything_is_written_and_nothing_taken_apart(code: int) -> None:
    done = leave(code)
    assert (done.returncode, done.stdout, done.stderr) == (code, "answer\nhandler\n", "")


def test_one_of_several_ranks_leaves_out_exit_handlers() -> None:
    done = leave(0, WORLD_SIZE="2")
    assert (done.returncode, done.stdout, done.stderr) == (0, "answer\n", "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no /dev/full")
def test_output_that_is_lost_is_an_error() -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        done = leave(0, stdout=full)
    finally:
        os.close(full)
    assert done.returncode == 2
    assert done.stderr == "error: standard output: [Errno 28] No space left on device\n"


def test_progress_is_on_stderr_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "_LINE_SECONDS", 0.0)
    for _ in range(2):
        show_progress()
    with Progress("encoding items", 10) as counted:
        counted.add(10)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == ["encoding items: 10 of 10, ETA 0:00"]
