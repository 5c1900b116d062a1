"""The manifest: content of a built dataset.

Imports neither polars nor pyarrow, so that a login node reads a manifest quickly. All records of a shard have
`users_per_record` users except the last, so record r of a shard starts at user `first_user + r * users_per_record`.
"""

import dataclasses
import functools
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import TypeAdapter, ValidationError

SCHEMA = 1
MANIFEST_NAME = "manifest.json"
CATALOG_NAME = "catalog.parquet"
USERS_NAME = "users.parquet"
LINK_NAME = "remote.json"
"""In folders of datasets whose shards are elsewhere (`shards.remote.linked`)."""

CANDIDATE_SETS: Final = tuple(f"{task}-{split}" for task in ("retrieval", "title") for split in ("valid", "test"))
"""Names of the stored evaluation candidates, in `candidates/NAME.npy`."""

MAX_EXPANSION: Final = 200
"""Largest ratio of decompressed to stored bytes that is read; real data has ratios up to 20, and files made to fill the
memory have 1,000 and more."""

_MAX_COUNT = 2**31 - 1  # users and items are stored as int32
_MAX_BYTES = 2**63 - 1
# No separator but that of `candidates/`, and no colon: a name is that of a file in the folder, never an address, a
# command or a path to elsewhere.
_FILE_NAME = re.compile(r"(candidates/)?[A-Za-z0-9_][A-Za-z0-9_.-]*")

Scalar = str | int | float | bool | None


class DatasetError(ValueError):
    """A problem that the user can fix; the message names the thing and the cure in one line."""


def one_line(message: str) -> str:
    """A message without line ends, and with what does not print escaped: parts of files, which may hold anything, would
    otherwise move the cursor of a terminal."""
    line = " ".join(message.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


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
    untrained: int = 0
    """Users without a training sequence: those who only validate (`shards.partitions.temporal`)."""

    @property
    def train_users(self) -> int:
        """Users with a training sequence."""
        return self.users - self.untrained


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
    """A built dataset. `build` has the options used, without paths, so that equal input gives equal manifests.

    `cleaning` counts rows dropped and values changed while reading, by reason; reasons that did not occur are left out.
    """

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
    cleaning: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """sha256 of the canonical JSON; datasets with equal fingerprints are byte-identical."""
        canonical = json.dumps(_content(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    @property
    def is_temporal(self) -> bool:
        """Whether the test begins at a point in time for all users (`shards.partitions.temporal`), instead of with the
        last event of each user."""
        return self.build.get("split") == "temporal"

    @property
    def num_train_users(self) -> int:
        """Number of users with a training sequence."""
        return sum(shard.train_users for shard in self.shards)

    @property
    def successive_after(self) -> int | None:
        """If the test has several targets per user: the point in time, in ms, after which every event is one."""
        after = self.build.get("split_time")
        return after if isinstance(after, int) and self.build.get("split_target") == "successive" else None

    def num_targets(self, split: Literal["valid", "test"]) -> int:
        """Number of targets of all users in a split."""
        if split == "valid":
            return self.statistics.users_with_valid
        targets = self.build.get("split_test_targets")
        return targets if isinstance(targets, int) else self.statistics.users_with_test

    def sample_size(self, users: int, split: Literal["valid", "test"]) -> int:
        """How many users to sample for about `users` of them to have a target in a split: more than that on a temporal
        split, where many have none."""
        if not self.is_temporal:
            return users
        with_target = self.statistics.users_with_valid if split == "valid" else self.statistics.users_with_test
        return min(math.ceil(users * self.num_users / max(with_target, 1)), self.num_users)

    @property
    def catalog_sha256(self) -> str:
        """sha256 of the catalog. Identifies the items and their texts; tokenised titles are cached under it."""
        return self.file(CATALOG_NAME).sha256

    def num_candidates(self, kind: str) -> int:
        """Stored negatives per user in one of `CANDIDATE_SETS`."""
        return self.title_negatives if kind.startswith("title") else self.negatives

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


def parse_json(text: str | bytes) -> Any:
    """Parse JSON that anyone may have written.

    Raises:
        ValueError: it is not JSON, or is nested too deeply to be read.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_manifest(directory: Path) -> Manifest:
    """Read and check `manifest.json` of a dataset folder.

    Its counts are checked against each other and the sizes of the files: memory is allocated by them.

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
        content = parse_json(text)
    except ValueError as error:
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
    _check_files(manifest, path)
    _check_layout(manifest, path)
    _check_counts(manifest, path)
    return manifest


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write `manifest.json`: the last step of a build, as its presence marks a dataset as complete."""
    text = json.dumps(_content(manifest), sort_keys=True, indent=1, ensure_ascii=False)
    (Path(directory) / MANIFEST_NAME).write_text(text + "\n", encoding="utf-8")


def _content(manifest: Manifest) -> dict[str, Any]:
    """The manifest as JSON has it: without what manifests of earlier versions do not have, where it says nothing."""
    content = dataclasses.asdict(manifest)
    if not content["cleaning"]:
        del content["cleaning"]
    for shard in content["shards"]:
        if not shard["untrained"]:
            del shard["untrained"]
    return content


def is_linked(directory: Path) -> bool:
    """Whether the shards of a dataset are elsewhere; they are checked when they are fetched."""
    return (Path(directory) / LINK_NAME).is_file()


def check_sizes(directory: Path, manifest: Manifest) -> None:
    """Check that every file exists and has its recorded size: cheap, detects truncated copies but not flipped bits.

    Raises:
        DatasetError: a file is missing or has a different size.
    """
    for entry in _present(directory, manifest):
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
    for entry in _present(directory, manifest):
        path = Path(directory) / entry.name
        if file_sha256(path) != entry.sha256:
            raise DatasetError(
                f"{path} is damaged (its sha256 differs from the manifest): copy the dataset again or rebuild it"
            )


def _present(directory: Path, manifest: Manifest) -> tuple[FileEntry | ShardEntry, ...]:
    """The files that the folder must have."""
    return manifest.files if is_linked(directory) else manifest.entries


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


def _check_files(manifest: Manifest, path: Path) -> None:
    """Check that all files of a dataset are listed once, under names that stay inside the dataset folder."""
    names = [entry.name for entry in manifest.entries]
    for name in names:
        if not _FILE_NAME.fullmatch(name):
            raise _damaged(path, f"{name[:80]!r} is not the name of a file in the dataset folder")
    [(most_listed, times)] = Counter(names).most_common(1) or [("", 0)]
    if times > 1:
        raise _damaged(path, f"{most_listed} is listed twice")
    needed = [CATALOG_NAME, USERS_NAME, *(f"candidates/{kind}.npy" for kind in CANDIDATE_SETS)]
    if missing := [name for name in needed if name not in names]:
        raise _damaged(path, f"{missing[0]} is not listed")
    if wrong := [entry for entry in manifest.entries if not 0 < entry.bytes <= _MAX_BYTES]:
        raise _damaged(path, f"{wrong[0].name} cannot have {wrong[0].bytes} bytes")


def _check_layout(manifest: Manifest, path: Path) -> None:
    """Check that shards cover the users in order."""
    next_user = 0
    for shard in manifest.shards:
        if shard.first_user != next_user or shard.users < 1:
            raise _damaged(path, f"shard {shard.name} does not start at user {next_user}")
        if shard.records != math.ceil(shard.users / max(manifest.users_per_record, 1)):
            raise _damaged(path, f"shard {shard.name} has a wrong number of records")
        if not 0 <= shard.untrained <= shard.users:
            raise _damaged(path, f"shard {shard.name} has a wrong number of users without training sequences")
        next_user += shard.users
    if next_user != manifest.num_users:
        raise _damaged(path, f"the shards hold {next_user} users, not {manifest.num_users}")
    if not manifest.num_train_users:
        raise _damaged(path, "no user has a training sequence")


def _check_counts(manifest: Manifest, path: Path) -> None:
    """Check that counts are possible, and that the files are large enough for them."""
    counts = dataclasses.asdict(manifest.statistics) | {"num_users": manifest.num_users}
    del counts["stages"]
    ranges = dict.fromkeys(counts, (0, _MAX_BYTES)) | {
        "num_items": (1, _MAX_COUNT),
        "num_users": (1, _MAX_COUNT),
        "negatives": (1, manifest.num_items),
        "title_negatives": (1, manifest.num_items),
        "users_per_record": (1, _MAX_COUNT),
    }
    for name, (low, high) in ranges.items():
        value = counts[name] if name in counts else getattr(manifest, name)
        if not low <= value <= high:  # also refuses NaN
            raise _damaged(path, f"{name} is {str(value)[:30]}, which is not between {low} and {high}")
    for name, value in manifest.cleaning.items():
        if not 0 < value <= _MAX_BYTES:
            raise _damaged(path, f"cleaning: {name[:80]!r} is {str(value)[:30]}, which is not a number of rows")
    # Every item has an id of its own, so that a catalog cannot be compressed to much less than a byte per item.
    if manifest.num_items > MAX_EXPANSION * manifest.file(CATALOG_NAME).bytes:
        raise _damaged(path, f"{CATALOG_NAME} is too small for {manifest.num_items} items")
    for kind in CANDIDATE_SETS:
        name, width = f"candidates/{kind}.npy", manifest.num_candidates(kind)
        if manifest.file(name).bytes < manifest.num_users * width * 4:  # int32
            raise _damaged(path, f"{name} is too small for {width} items of {manifest.num_users} users")
