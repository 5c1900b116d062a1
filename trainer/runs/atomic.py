"""Folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
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
