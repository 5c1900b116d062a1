"""Fetches one file of a dataset from an address: https by this package, any other scheme (s3, gs, ...) by fsspec."""

import logging
import shutil
import time
from pathlib import Path

from shards.manifest import DatasetError, file_sha256
from shards.remote.download import download

log = logging.getLogger("shards")

_BLOCK = 1 << 20
# What no number of tries changes, as the file systems of fsspec raise it.
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError)


def fetch(address: str, name: str, path: Path, *, sha256: str | None, tries: int = 6, pause: float = 1.0) -> None:
    """Fetch the file `name` below an address to `path`, which appears when it is complete and has the right sha256.

    Args:
        sha256: None accepts any content.
        tries: how often in a row it may fail.
        pause: seconds before the second try, doubled for each further one.

    Raises:
        DatasetError: the file is not there, keeps failing, or has another content; the message names its address.
    """
    url = f"{address.rstrip('/')}/{name}"
    if url.startswith(("http://", "https://")):
        download(url, path, sha256=sha256, tries=tries, pause=pause)
        return
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(tries):
        try:
            _copy(url, part)
        except _FINAL as error:
            raise DatasetError(f"{url} cannot be fetched ({error}): check the address and the permissions") from None
        except OSError as error:
            if attempt + 1 == tries:
                raise DatasetError(f"{url} cannot be fetched ({error}), {tries} times in a row: try later") from None
            log.info("note: %s: %s; trying again", name, error)
            time.sleep(pause * 2**attempt)
            continue
        found = file_sha256(part)
        if sha256 in (None, found):
            part.rename(path)
            return
        part.unlink()
        if attempt:
            raise DatasetError(f"{url} has sha256 {found}, not {sha256}, twice: it was replaced or damaged there")
        log.info("note: %s arrived damaged; fetching it again", name)


def _copy(url: str, path: Path) -> None:
    """Copy a file from anywhere.

    Raises:
        OSError: it cannot be read.
        DatasetError: there is no library for such addresses.
    """
    import fsspec  # slow, and needed for few addresses

    try:
        source = fsspec.open(url, "rb")
    except (ImportError, ValueError) as error:
        raise DatasetError(f"{url} cannot be read ({error}): install what reads such addresses") from None
    with source as file, path.open("wb") as target:
        shutil.copyfileobj(file, target, _BLOCK)
