"""Salted hashes in place of the user ids of a dataset (`--hash-users KEY`), and the key file that undoes them.

A dataset holds raw user ids in one table, from which pages, recommendations and logs take them. Hashed, they tell
nobody without the key who the users are. The key file is a parquet table of hashes and raw ids, with the salt in its
metadata: builds with the same key file give the same users the same hashes.
"""

import hashlib
import hmac
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from shards.manifest import DatasetError

_SALT = b"salt"
_SALT_BYTES = 32
_DIGITS = 32
"""Hex digits of a hash: 128 bits, so that no two of a billion users are expected to collide."""
_SCHEMA = pa.schema([("hash", pa.string()), ("raw_id", pa.string())])


@dataclass(frozen=True)
class UserKey:
    """The content of a key file."""

    salt: bytes
    raw_ids: dict[str, str]
    """Raw user id of each hash, of all builds with this key."""

    def hashed(self, raw_ids: Sequence[str]) -> list[str]:
        """HMAC-SHA256 of each raw id with the salt, as hex digits."""
        return [hmac.new(self.salt, raw.encode(), hashlib.sha256).hexdigest()[:_DIGITS] for raw in raw_ids]

    def with_users(self, raw_ids: Sequence[str]) -> "UserKey":
        """The key that also undoes the hashes of these users."""
        return UserKey(self.salt, self.raw_ids | dict(zip(self.hashed(raw_ids), raw_ids, strict=True)))


def open_key(path: Path, out: Path) -> UserKey:
    """Read the key file of a build of `out`, or make a new salt if there is none.

    Raises:
        DatasetError: it is not a key file, or would be in the dataset's folder.
    """
    if path.resolve().is_relative_to(out.resolve()):
        raise DatasetError(f"--hash-users {path}: whoever gets the dataset would get the key: give a file elsewhere")
    return read_key(path) if path.exists() else UserKey(secrets.token_bytes(_SALT_BYTES), {})


def read_key(path: Path) -> UserKey:
    """Read a key file.

    Raises:
        DatasetError: there is none, or it is not a key file.
    """
    try:
        with path.open("rb") as file, pq.ParquetFile(file) as table:
            salt = (table.schema_arrow.metadata or {}).get(_SALT, b"")
            if len(salt) != 2 * _SALT_BYTES or table.schema_arrow.remove_metadata() != _SCHEMA:
                raise ValueError("it has no salt, or other columns")
            hashes, raw_ids = (column.to_pylist() for column in table.read().columns)
            return UserKey(bytes.fromhex(salt.decode()), dict(zip(hashes, raw_ids, strict=True)))
    except (OSError, ValueError, pa.ArrowException) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise DatasetError(
            f"{path} is not a key file of --hash-users ({reason[:200]}): give the file that a build wrote"
        ) from None


def write_key(path: Path, key: UserKey) -> None:
    """Write a key file that only its owner can read, in place of an older one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    schema = _SCHEMA.with_metadata({_SALT: key.salt.hex()})
    columns = [pa.array(list(key.raw_ids), pa.string()), pa.array(list(key.raw_ids.values()), pa.string())]
    try:
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            pq.write_table(pa.Table.from_arrays(columns, schema=schema), file, compression="zstd")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def look_up(key: UserKey, users: Sequence[str]) -> list[tuple[str, str]]:
    """Hash and raw id of each user, who is given by either.

    Raises:
        DatasetError: the key has no such user.
    """
    hashes = {raw: hashed for hashed, raw in key.raw_ids.items()}
    if unknown := [user for user in users if user not in key.raw_ids and user not in hashes]:
        raise DatasetError(
            f"the key has no user {unknown[0][:80]!r}: give a hash, or a raw id, of a dataset that was built with it"
        )
    return [(user, key.raw_ids[user]) if user in key.raw_ids else (hashes[user], user) for user in users]
