"""Two starts on one run folder, and starts after an end of any kind."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import socket
import time
from pathlib import Path

import pytest
from fault_checks import assert_same_end, wait_for
from fault_rank import Fault, Preset, start_ranks
from helpers import run_command

from trainer.config import ConfigError
from trainer.runs import lock
from trainer.runs.folder import RunFolder
from trainer.runs.lock import RunLock, check_not_locked


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    monkeypatch.setattr(lock, "_PATIENCE", 0.1)
    return RunFolder(tmp_path / "run")


def sign(run: RunFolder, **changes: object) -> None:
    """Leave what a process leaves that was killed while it trained."""
    with RunLock(run):
        content = json.loads(run.lock.read_text())
    run.path.mkdir()
    run.lock.write_text(json.dumps(content | changes))


def test_a_second_start_is_refused_and_the_first_goes_on(tmp_path: Path, preset: Preset, undisturbed: Path) -> None:
    run = tmp_path / "run"
    words = [str(preset(run))]
    first = start_ranks(tmp_path / "first", words, [Fault(0, 8, "data", f"wait {tmp_path / 'go'}")])
    wait_for(first, "step 7/14")
    second = start_ranks(tmp_path / "second", words)
    assert second.wait(60) == [2, 2], second.all_said
    process, host = first.processes[0].pid, socket.gethostname()
    found = re.search(r"error: (\S+) is being trained by process (\d+) on (\S+) since (.*) UTC: ", second.said(0))
    assert found, second.all_said
    assert found.groups()[:3] == (str(run), str(process), host)
    evaluated = run_command("launchers/evaluate.py", run)
    assert evaluated.returncode == 0, evaluated.stderr
    (run / "results.jsonl").unlink()
    (tmp_path / "go").touch()
    assert first.wait(60) == [0, 0], first.all_said
    assert not (run / "lock").exists()
    assert_same_end(run, undisturbed)


def test_starts_that_race_for_one_folder(tmp_path: Path, preset: Preset) -> None:
    """Both pass the check before the imports; the lock itself decides, on all ranks."""
    words, go = [str(preset(tmp_path / "run"))], tmp_path / "go"
    trains_on = Fault(0, 2, "data", f"wait {go}")  # until the other one was refused
    starts = [start_ranks(tmp_path / name, words, [trains_on]) for name in ("first", "second")]
    end = time.monotonic() + 120
    while time.monotonic() < end and not any(start.processes[0].exitcode for start in starts):
        time.sleep(0.1)
    go.touch()
    codes = sorted(start.wait(120) for start in starts)
    assert codes == [[0, 0], [2, 2]], [start.all_said for start in starts]


def test_a_folder_of_a_killed_process_is_free(run: RunFolder) -> None:
    sign(run, pid=os.getpid())
    check_not_locked(run)
    with RunLock(run):
        assert json.loads(run.lock.read_text())["pid"] == os.getpid()


def test_a_refused_run_leaves_nothing(run: RunFolder) -> None:
    with pytest.raises(ValueError, match="no teacher"), RunLock(run):
        raise ValueError("no teacher")
    assert not run.path.exists()


def test_a_holder_is_named_before_and_by_the_lock(run: RunFolder) -> None:
    named = rf"run is being trained by process {os.getpid()} on {socket.gethostname()} since .*: wait for it.*remove"
    with RunLock(run):
        with pytest.raises(ConfigError, match=named):
            check_not_locked(run)
        with pytest.raises(ConfigError, match=named):
            RunLock(run).__enter__()
    check_not_locked(run)


def test_a_new_start_of_a_slurm_job_takes_over(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that Slurm has lost may hold the lock for ever; rank.sh ends its ranks once it is back."""
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    with RunLock(run):
        with pytest.raises(ConfigError, match=r"\(Slurm job 77\)"):
            RunLock(run).__enter__()
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        check_not_locked(run)
        with RunLock(run):
            assert json.loads(run.lock.read_text())["slurm_start"] == "77.1"


def test_a_folder_that_is_removed_is_taken_again_or_lost(run: RunFolder) -> None:
    with RunLock(run) as held:
        assert not held.taken_again()
        run.lock.unlink()
        run.path.rmdir()
        assert held.taken_again()
        assert not held.taken_again()
        run.lock.unlink()
        with RunLock(run), pytest.raises(ConfigError, match=r"was removed while it trained: .* is being trained by"):
            held.taken_again()


@pytest.mark.parametrize(
    ("holder", "free"),
    [
        ({"pid": 2**22 + 1}, True),
        ({"pid": os.getppid()}, False),
        ({"host": "elsewhere"}, False),
        ({"slurm_start": "5.0", "host": "elsewhere"}, True),
    ],
    ids=["ended", "runs", "another host", "earlier start of this job"],
)
def test_a_file_system_without_locks(
    run: RunFolder, holder: dict[str, object], free: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    sign(run, **holder)
    monkeypatch.setattr(fcntl, "flock", unsupported)
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    check_not_locked(run)
    if free:
        with RunLock(run):
            assert run.lock.exists()
    else:
        with pytest.raises(ConfigError, match="if it no longer exists, remove"):
            RunLock(run).__enter__()
        run.lock.unlink()  # the cure
        with RunLock(run):
            pass
