"""Packaged presets, which commands accept by name."""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal

PRESETS: Final = Path(__file__).parents[1] / "presets"

_IN_REPOSITORY: Final = Path("trainer", "presets")
"""Folder of the presets relative to the root of the repository, as the documentation writes it."""

_OTHERS: Final = ("experiments", "recipes")
"""Folders of files that describe no single run."""


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


def find_in(folder: Literal["experiments", "recipes"], path: Path) -> Path:
    """Resolve the name of a packaged experiment or recipe to its file; any other path is returned as it is."""
    named = PRESETS / folder / f"{path}.yaml"
    return named if path.parent == Path() and named.is_file() and not path.is_file() else path


def names_in(folder: Literal["experiments", "recipes"]) -> list[str]:
    """Names of the packaged experiments or recipes."""
    return sorted(file.stem for file in (PRESETS / folder).glob("*.yaml"))


def _files() -> list[Path]:
    """Packaged presets of runs; their file names are unique, also across subfolders."""
    files = [file for file in PRESETS.glob("**/*.yaml") if file.parent.name not in _OTHERS]
    return sorted(files, key=lambda file: (file.parent != PRESETS, file))
