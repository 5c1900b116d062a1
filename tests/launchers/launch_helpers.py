"""The shape of a refusal, and what is in a folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Main = Callable[[Sequence[str]], Any]
Refused = Callable[..., str]


@dataclass(frozen=True)
class Trained:
    """A finished run and what the command printed."""

    preset: Path
    output: Path
    stdout: str
    stderr: str


def one_error(code: int, out: str, err: str) -> str:
    """The error line, where a command failed as commands should."""
    assert code == 2, err
    assert out == ""
    assert err.startswith("error: "), err
    assert err.count("\n") == 1, err
    return err


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
