"""Trained runs of the real commands, and commands that must fail."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
from helpers import llm_srec_config, run_command, write_config
from launch_helpers import Main, Refused, Trained, one_error

from launchers.command import run_command as run_main


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """Undo what commands run in this process leave in its environment: rank, port, accelerator."""
    with patch.dict(os.environ):
        yield


@pytest.fixture(scope="session")
def srec(tmp_path_factory: pytest.TempPathFactory, world: Path, teacher: Path, tiny_llm: Path) -> Trained:
    """LLM-SRec trained by the real command in one process."""
    folder = tmp_path_factory.mktemp("srec")
    preset = write_config(folder / "llm_srec.yaml", llm_srec_config(world, folder / "srec", teacher, tiny_llm))
    done = run_command("launchers/train.py", preset)
    assert done.returncode == 0, done.stderr
    return Trained(preset, folder / "srec", done.stdout, done.stderr)


@pytest.fixture
def preset(tmp_path: Path, world: Path, teacher: Path, tiny_llm: Path) -> Path:
    """A valid run whose output does not exist yet."""
    return write_config(tmp_path / "preset.yaml", llm_srec_config(world, tmp_path / "run", teacher, tiny_llm))


@pytest.fixture(scope="session")
def deepspeed_imported() -> None:
    """DeepSpeed tries a compiler once per process and hides its complaints in a shell, but not under pytest."""
    import deepspeed

    assert deepspeed.ops.__compatible_ops__


@pytest.fixture
def refused(deepspeed_imported: None, capfd: pytest.CaptureFixture[str]) -> Refused:
    """Run a command in this process; returns its one line of error."""

    def call(main: Main, *words: str | Path, **environment: str) -> str:
        capfd.readouterr()
        argv = ["command", *map(str, words)]
        with patch.dict(os.environ, environment), patch.object(sys, "argv", argv):
            code = run_main(main)
        out, err = capfd.readouterr()
        return one_error(code, out, err)

    return call
