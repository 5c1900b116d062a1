"""Atomic writes of folders and files: complete or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that replaces `folder` if the block succeeds and is removed if it fails."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield beside
        if folder.exists():
            shutil.rmtree(folder)
        beside.chmod(0o755)  # mkdtemp creates it with 0o700
        os.rename(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary file that replaces `path` if the block succeeds and is removed if it fails.

    Each writer has its own, so that two processes may write the same file: the later one wins.
    """
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    os.close(descriptor)
    beside = Path(name)
    try:
        with named_in_errors(path):
            yield beside
            beside.chmod(0o644)  # mkstemp creates it with 0o600
            sync(beside)
            os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Replace a small file so that a reader sees either the old content or the new, never a part."""
    beside = path.with_name(f".{path.name}.writing")
    with named_in_errors(path):
        beside.write_text(text)
        sync(beside)  # before the rename, or a crash could leave an empty file under the final name
        os.replace(beside, path)


@contextmanager
def named_in_errors(path: Path) -> Iterator[None]:
    """Add the path to errors that name no file, as those of writing to a full disk do."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def sync(path: Path) -> None:
    """Flush a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
