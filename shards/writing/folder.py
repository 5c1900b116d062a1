"""The folder of a dataset appears under its name only when it is complete."""

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shards.manifest import MANIFEST_NAME, DatasetError

log = logging.getLogger("shards")


def check_out(out: Path, overwrite: bool) -> None:
    """Refuse to replace anything but an empty folder or, with `overwrite`, a dataset.

    Raises:
        DatasetError: there is a file or another folder.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise DatasetError(f"{out} is a file: give a folder for the dataset")
    if not any(out.iterdir()):
        return
    if not overwrite:
        raise DatasetError(f"{out} exists and is not empty: use --overwrite, or a different folder")
    if not (out / MANIFEST_NAME).is_file():
        raise DatasetError(f"{out} is not a dataset (no {MANIFEST_NAME}) and is not replaced: empty it yourself")


@contextmanager
def appearing(out: Path, overwrite: bool) -> Iterator[Path]:
    """Yield a folder beside `out` that is renamed to `out` if the block succeeds and removed if it fails."""
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    out.parent.mkdir(parents=True, exist_ok=True)
    for other in out.parent.iterdir():
        if other.name.startswith(f".{out.name}.partial-"):
            log.info("note: %s belongs to a different build, running or killed; remove it if killed", other)
    partial.mkdir()
    try:
        yield partial
        check_out(out, overwrite)  # A concurrent build may have finished first.
        if (out / MANIFEST_NAME).exists():
            old = out.with_name(f".{out.name}.old-{os.getpid()}")
            out.rename(old)
            partial.rename(out)
            shutil.rmtree(old)
        else:
            partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
