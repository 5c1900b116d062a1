"""Packaged presets, which commands accept by name."""

from __future__ import annotations

from pathlib import Path
from typing import Final

PRESETS: Final = Path(__file__).parents[1] / "presets"

_IN_REPOSITORY: Final = Path("trainer", "presets")
"""Folder of the presets relative to the root of the repository, as the documentation writes it."""


def find_preset(path: Path) -> Path:
    """Resolve a command's PRESET argument to a file.

    Args:
        path: a file; the name of a packaged preset, with or without `.yaml`; or its path in the repository, which an
            installed package accepts from any working directory.

    Returns:
        The path itself if it is a file, or if it names no packaged preset; reading it then raises the error.
    """
    by_name = path.parent == Path() or path.is_relative_to(_IN_REPOSITORY)
    if path.is_file() or not by_name:
        return path
    return next((file for file in _files() if path.name in (file.name, file.stem)), path)


def preset_names() -> list[str]:
    """File names of the packaged presets: first those in `trainer/presets` itself, then those in its subfolders."""
    return [file.name for file in _files()]


def _files() -> list[Path]:
    """Packaged presets; their file names are unique, also across subfolders."""
    return sorted(PRESETS.glob("**/*.yaml"), key=lambda file: (file.parent != PRESETS, file))
