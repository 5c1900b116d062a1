"""Checks of a command's error line and of a folder's contents."""

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
    """The error line of a command that failed as it should: exit code 2 and one line on stderr."""
    assert code == 2, err
    assert out == ""
    assert err.startswith("error: "), err
    assert err.count("\n") == 1, err
    return err


def contents(folder: Path) -> dict[str, bytes]:
    """Contents of every file below a folder, by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
