"""The manifest: content of a built dataset. Of this package the trainer imports it and `splitmix`, nothing else.

Imports neither polars nor pyarrow, so that a login node reads a manifest quickly. All records of a shard have
`users_per_record` users except the last, so record r of a shard starts at user `first_user + r * users_per_record`.
"""

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from pydantic import TypeAdapter, ValidationError

SCHEMA = 1
MANIFEST_NAME = "manifest.json"
CATALOG_NAME = "catalog.parquet"
USERS_NAME = "users.parquet"

Scalar = str | int | float | bool | None


class DatasetError(ValueError):
    """A problem that the user can fix; the message names the thing and the cure in one line."""


@dataclass(frozen=True)
class FileEntry:
    """A file of the dataset; `name` is relative to the dataset folder."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ShardEntry:
    """A tar with users `first_user .. first_user + users - 1` in `records` members."""

    name: str
    bytes: int
    sha256: str
    first_user: int
    users: int
    records: int


@dataclass(frozen=True)
class Stage:
    """Counts after a stage of the build."""

    name: str
    users: int
    items: int
    interactions: int


@dataclass(frozen=True)
class Statistics:
    """Counts over train, validation and test together; a length is a user's number of interactions."""

    users: int
    items: int
    interactions: int
    mean_length: float
    median_length: float
    min_length: int
    max_length: int
    users_with_valid: int
    users_with_test: int
    duplicate_events: int
    bad_times: int
    tied_pairs: int
    missing_titles: int
    stages: tuple[Stage, ...]


@dataclass(frozen=True)
class Manifest:
    """A built dataset. `build` has the options used, without paths, so that equal input gives equal manifests."""

    schema: int
    name: str
    num_users: int
    num_items: int
    negatives: int
    title_negatives: int
    users_per_record: int
    shards: tuple[ShardEntry, ...]
    files: tuple[FileEntry, ...]
    statistics: Statistics
    build: Mapping[str, Scalar]

    @property
    def fingerprint(self) -> str:
        """sha256 of the canonical JSON; datasets with equal fingerprints are byte-identical."""
        canonical = json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    @property
    def catalog_sha256(self) -> str:
        """sha256 of the catalog. Identifies the items and their texts; tokenised titles are cached under it."""
        return self.file(CATALOG_NAME).sha256

    @property
    def entries(self) -> tuple[FileEntry | ShardEntry, ...]:
        """All files of the dataset except the manifest."""
        return (*self.files, *self.shards)

    def file(self, name: str) -> FileEntry:
        """Entry of a file that is not a shard, such as `candidates/retrieval-test.npy`.

        Raises:
            DatasetError: the dataset has no such file.
        """
        for entry in self.files:
            if entry.name == name:
                return entry
        known = ", ".join(entry.name for entry in self.files)
        raise DatasetError(f"dataset {self.name!r} has no file {name!r} (it has {known}): rebuild it")


_MANIFEST: Final = TypeAdapter(Manifest)


def read_manifest(directory: Path) -> Manifest:
    """Read and check `manifest.json` of a dataset folder.

    Raises:
        DatasetError: the manifest is missing, damaged, or of a newer schema.
    """
    path = Path(directory) / MANIFEST_NAME
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise DatasetError(
            f"{directory} is not a dataset (no {MANIFEST_NAME}): build one with `python -m shards build`"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path} cannot be read ({error}): copy the dataset again or rebuild it") from None
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise _damaged(path, f"not JSON, {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("schema"), int):
        raise _damaged(path, "no schema number")
    if content["schema"] > SCHEMA:
        raise DatasetError(
            f"{path} has schema {content['schema']}, this version reads up to {SCHEMA}: "
            "update this software or rebuild the dataset"
        )
    try:
        manifest = _MANIFEST.validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        raise _damaged(path, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    _check_layout(manifest, path)
    return manifest


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write `manifest.json`: the last step of a build, as its presence marks a dataset as complete."""
    text = json.dumps(dataclasses.asdict(manifest), sort_keys=True, indent=1, ensure_ascii=False)
    (Path(directory) / MANIFEST_NAME).write_text(text + "\n", encoding="utf-8")


def check_sizes(directory: Path, manifest: Manifest) -> None:
    """Check that every file exists and has its recorded size: cheap, detects truncated copies but not flipped bits.

    Raises:
        DatasetError: a file is missing or has a different size.
    """
    for entry in manifest.entries:
        path = Path(directory) / entry.name
        if not path.is_file():
            raise DatasetError(f"{path} is missing: copy the dataset again or rebuild it")
        size = path.stat().st_size
        if size != entry.bytes:
            raise DatasetError(
                f"{path} has {size} bytes, the manifest says {entry.bytes}: copy the dataset again or rebuild it"
            )


def verify(directory: Path, manifest: Manifest) -> None:
    """Check size and sha256 of every file.

    Raises:
        DatasetError: the message names the first bad file.
    """
    check_sizes(directory, manifest)
    for entry in manifest.entries:
        path = Path(directory) / entry.name
        if file_sha256(path) != entry.sha256:
            raise DatasetError(
                f"{path} is damaged (its sha256 differs from the manifest): copy the dataset again or rebuild it"
            )


def check_unchanged(directory: Path, entry: FileEntry | ShardEntry) -> None:
    """Check a file that is read in the middle of a run, whose dataset may have been replaced or damaged meanwhile.

    A process hashes every version of a file once, at the cost of reading it once more; after that, it costs a `stat`.

    Raises:
        DatasetError: the file is not the one in the manifest.
    """
    path = Path(directory) / entry.name
    try:
        found = path.stat()
        digest = _sha256_of_version(path, (found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size))
    except OSError as error:
        raise DatasetError(f"{path} cannot be read ({error}): copy the dataset again or rebuild it") from None
    if digest != entry.sha256:
        raise DatasetError(
            f"{path} was replaced or damaged since the dataset was opened (its sha256 differs from the manifest): put "
            "the dataset back and start again, or choose another output for the new one"
        )


@functools.cache
def _sha256_of_version(path: Path, version: tuple[int, int, int, int]) -> str:
    return file_sha256(path)


def file_sha256(path: Path) -> str:
    """sha256 of a file as hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _damaged(path: Path, what: str) -> DatasetError:
    return DatasetError(f"{path} is damaged ({what}): copy the dataset again or rebuild it")


def _check_layout(manifest: Manifest, path: Path) -> None:
    """Check that shards cover the users in order, and that file names stay inside the dataset folder."""
    next_user = 0
    for shard in manifest.shards:
        if shard.first_user != next_user or shard.users < 1:
            raise _damaged(path, f"shard {shard.name} does not start at user {next_user}")
        if shard.records != math.ceil(shard.users / max(manifest.users_per_record, 1)):
            raise _damaged(path, f"shard {shard.name} has a wrong number of records")
        next_user += shard.users
    if next_user != manifest.num_users:
        raise _damaged(path, f"the shards hold {next_user} users, not {manifest.num_users}")
    for entry in manifest.entries:
        name = PurePosixPath(entry.name)
        if name.is_absolute() or ".." in name.parts:
            raise _damaged(path, f"file name {entry.name!r} leaves the dataset folder")
