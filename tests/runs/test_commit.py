"""The recorded commit of the source that a process runs."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from trainer.runs.commit import COMMIT_FILE, git_commit


def test_git_commit(tmp_path: Path) -> None:
    assert git_commit(tmp_path) == "unknown"

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    git("init", "-q")
    assert git_commit(tmp_path) == "unknown"  # no commit yet
    (tmp_path / "code.py").write_text("1")
    (tmp_path / "sub").mkdir()
    git("add", ".")
    git("commit", "-q", "-m", "one")
    head = git("rev-parse", "HEAD")
    assert git_commit(tmp_path) == head
    (tmp_path / "output.txt").write_text("a result, not source")
    assert git_commit(tmp_path) == head
    (tmp_path / "code.py").write_text("2")
    assert git_commit(tmp_path) == head + "+dirty"
    assert git_commit(tmp_path / "sub") == "unknown"  # installed inside another repository


def test_git_commit_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_commit(tmp_path) == "unknown"


def test_a_copy_knows_its_commit(tmp_path: Path) -> None:
    (tmp_path / COMMIT_FILE).write_text("0123abc+dirty\n")
    assert git_commit(tmp_path) == "0123abc+dirty"
