"""Ctrl-C in a command that has nothing to resume. Training: `tests/faults/test_preemption.py`."""

from __future__ import annotations

import sys
from importlib import import_module

import pytest

from launchers.command import run_command


@pytest.mark.parametrize(
    ("command", "function", "words"),
    [
        ("plan", "load_config", ["llm_srec", "--kind", "a6000"]),
        ("report", "report", ["runs/sasrec"]),
        ("evaluate", "check_saved_run", ["runs/sasrec"]),
        ("recommend", "load_run", ["runs/sasrec", "--user", "196"]),
    ],
)
def test_no_resume_is_promised(
    command: str, function: str, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    module = import_module(f"launchers.{command}")
    monkeypatch.setattr(module, function, interrupt)
    monkeypatch.setattr(sys, "argv", [command, *words])
    assert run_command(module.main) == 130
    assert capsys.readouterr().err == "interrupted\n"
