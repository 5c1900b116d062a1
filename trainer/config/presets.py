"""The presets that come with the package, which commands take by name."""

from __future__ import annotations

from pathlib import Path
from typing import Final

PRESETS: Final = Path(__file__).parents[1] / "presets"

_IN_REPOSITORY: Final = Path("trainer", "presets")
"""How the documentation writes their folder, as seen from the root of the repository."""


def find_preset(path: Path) -> Path:
    """The file that a command's PRESET argument means.

    Args:
        path: a file; or a packaged preset's name, with or without `.yaml`; or its path in the repository, which an
            installed package accepts from any working directory.

    Returns:
        The path itself if it is a file or means no packaged preset: reading it then gives the error.
    """
    by_name = path.parent == Path() or path.is_relative_to(_IN_REPOSITORY)
    if path.is_file() or not by_name:
        return path
    return next((file for file in _files() if path.name in (file.name, file.stem)), path)


def preset_names() -> list[str]:
    """File names of the packaged presets: those of `trainer/presets` itself, then those of its subfolders."""
    return [file.name for file in _files()]


def _files() -> list[Path]:
    """The packaged presets; no two share a file name."""
    return sorted(PRESETS.glob("**/*.yaml"), key=lambda file: (file.parent != PRESETS, file))
