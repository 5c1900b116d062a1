"""Folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A new folder to write into, which replaces `folder` when the block ends well; else nothing is left of it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield beside
        if folder.exists():
            shutil.rmtree(folder)
        beside.chmod(0o755)  # mkdtemp makes private folders
        os.rename(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def write_atomically(path: Path, text: str) -> None:
    """Replace a small file so that a reader finds the old or the new one, whole."""
    beside = path.with_name(f".{path.name}.writing")
    beside.write_text(text)
    sync(beside)
    os.replace(beside, path)


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
