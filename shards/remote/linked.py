"""Datasets whose shards are elsewhere: all other files are in the folder, and shards are fetched when they are read.

A folder becomes such a dataset by `remote.json`, which has the address and the size of the cache. Processes of a
machine share the cache: one fetches a shard, others wait for it, and none removes one that is being read.
"""

import bisect
import contextlib
import fcntl
import itertools
import json
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from shards.manifest import (
    LINK_NAME,
    MANIFEST_NAME,
    DatasetError,
    Manifest,
    ShardEntry,
    is_linked,
    parse_json,
    read_manifest,
)
from shards.remote.fetch import fetch

CACHE_NAME = "cache"
_FETCHED_NAME = "fetched"


@dataclass(frozen=True)
class Link:
    """Where the shards of a dataset are."""

    address: str
    """Address of the folder that has them, such as `https://host/data` or `s3://bucket/data`."""
    cache_bytes: int
    """Most bytes of shards that are kept on this machine; one more shard for each process that fetches."""


def link_dataset(address: str, directory: Path, *, cache_bytes: int) -> Manifest:
    """Make `directory` a dataset whose shards are at `address`: fetches all other files. Resumes after an interruption.

    Raises:
        DatasetError: the folder has a dataset, a file cannot be fetched, or the cache cannot hold the largest shard.
    """
    if (directory / MANIFEST_NAME).exists():
        raise DatasetError(f"{directory} has a dataset: give a different folder")
    fetched = directory / _FETCHED_NAME
    (fetched / MANIFEST_NAME).unlink(missing_ok=True)  # it may have changed since an interrupted call
    fetch(address, MANIFEST_NAME, fetched / MANIFEST_NAME, sha256=None)
    manifest = read_manifest(fetched)
    largest = max(shard.bytes for shard in manifest.shards)
    if cache_bytes < largest:
        raise DatasetError(f"the cache of {cache_bytes:,} bytes cannot hold a shard of {largest:,}: raise --cache-gb")
    for entry in manifest.files:
        fetch(address, entry.name, directory / entry.name, sha256=entry.sha256)
    (directory / LINK_NAME).write_text(json.dumps(asdict(Link(address, cache_bytes)), indent=1) + "\n")
    (fetched / MANIFEST_NAME).rename(directory / MANIFEST_NAME)  # last: it marks a dataset as complete
    fetched.rmdir()
    return manifest


def read_link(directory: Path) -> Link:
    """Where the shards of a linked dataset are.

    Raises:
        DatasetError: `remote.json` is damaged.
    """
    path = directory / LINK_NAME
    try:
        found = parse_json(path.read_bytes())
        return Link(str(found["address"]), int(found["cache_bytes"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DatasetError(f"{path} is damaged ({error!r}): link the dataset again") from None


@contextlib.contextmanager
def held_shard(directory: Path, entry: ShardEntry) -> Iterator[Path]:
    """The file of a shard, which stays while it is held: in the dataset folder or, fetched if need be, in the cache.

    Raises:
        DatasetError: it cannot be fetched, or is not the one in the manifest; the message names its address.
    """
    if not is_linked(directory):
        yield directory / entry.name
        return
    cache = directory / CACHE_NAME
    cache.mkdir(exist_ok=True)
    path = cache / entry.name
    with _lock_file(path) as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        # Changing the kind of a lock gives it up for a moment, in which another process may fetch or remove the file.
        while not _is_complete(path, entry):
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not _is_complete(path, entry):
                link = read_link(directory)
                path.unlink(missing_ok=True)
                _make_room(cache, link.cache_bytes - entry.bytes)
                fetch(link.address, entry.name, path, sha256=entry.sha256)
            fcntl.flock(lock, fcntl.LOCK_SH)
        os.utime(path)  # the shards used last are kept
        yield path


class Prefetch:
    """Fetches shards of a linked dataset in a thread, ahead of their use. Does nothing for datasets in a folder.

    An error is left to who reads the shard, who meets it again.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._cache_bytes = read_link(directory).cache_bytes if is_linked(directory) else 0
        self._stopped = threading.Event()

    def start(self, shards: Sequence[ShardEntry]) -> None:
        """Fetch these shards, in order; no more than the cache holds, which would remove the first ones unread."""
        total = list(itertools.accumulate(entry.bytes for entry in shards))
        shards = shards[: bisect.bisect_right(total, self._cache_bytes)]
        if shards:
            # A daemon, so that a slow server does not hold up the end of the process.
            threading.Thread(target=self._fetch, args=(shards,), name="shards", daemon=True).start()

    def close(self) -> None:
        """Fetch no more after the shard in work."""
        self._stopped.set()

    def _fetch(self, shards: Sequence[ShardEntry]) -> None:
        for entry in shards:
            if self._stopped.is_set():
                return
            try:
                with held_shard(self._directory, entry):
                    pass
            except (DatasetError, OSError):
                return


def _lock_file(path: Path) -> IO[bytes]:
    return path.with_name(path.name + ".lock").open("ab")


def _is_complete(path: Path, entry: ShardEntry) -> bool:
    return _size_and_use(path)[0] == entry.bytes


def _make_room(cache: Path, most: int) -> None:
    """Remove the shards used longest ago until at most `most` bytes are left, except those in use."""
    found = {path: _size_and_use(path) for path in cache.glob("*.tar")}
    total = sum(size for size, _ in found.values())
    for path, (size, _) in sorted(found.items(), key=lambda entry: entry[1][1]):
        if total <= most:
            return
        with _lock_file(path) as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:  # being read
                continue
            path.unlink(missing_ok=True)
            total -= size


def _size_and_use(path: Path) -> tuple[int, float]:
    """Bytes of a file and when it was last used; zeros if another process has removed it."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return 0, 0.0
    return found.st_size, found.st_mtime
