"""Dataset files that are not streamed: item titles, raw user ids, evaluation candidates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from shards.manifest import (
    CATALOG_NAME,
    MAX_EXPANSION,
    USERS_NAME,
    DatasetError,
    Manifest,
    check_sizes,
    check_unchanged,
    read_manifest,
    verify,
)
from trainer.config import RepeatDates, Split
from trainer.data.reading.counter_rng import IntArray

CandidateSet = Literal["retrieval", "title"]
"""Which stored negatives: those of retrieval, or those of title generation."""
Text = Literal["title", "description", "brand", "category"]
"""Text columns of the catalog."""
Column = Literal["raw_id"] | Text


@dataclass(frozen=True)
class Dataset:
    """An open dataset: its manifest, checked against the files, and its item titles."""

    path: Path
    manifest: Manifest
    titles: tuple[str, ...]
    """`titles[i - 1]` is the title of item i."""
    repeat_dates: RepeatDates = "own"
    """`data.repeat_dates` of the run that reads it."""
    has_users: bool = True
    """False in an exported run, which can neither be trained nor evaluated."""

    @property
    def num_items(self) -> int:
        return self.manifest.num_items

    def candidates(self, kind: CandidateSet, split: Split) -> IntArray:
        """Stored negatives of all users, (U, C), memory-mapped; row u belongs to user index u. Not range-checked.

        Raises:
            DatasetError: not an array of the manifest's number of users and candidates, or the file was
                replaced.
        """
        name = f"{kind}-{split}"
        path = self.path / "candidates" / f"{name}.npy"
        shape = (self.manifest.num_users, self.manifest.num_candidates(name))
        try:
            negative_UC: IntArray = np.lib.format.open_memmap(path, mode="r")
        except (OSError, ValueError, SyntaxError, TokenError) as error:  # the last two: of a header that is no Python
            raise _damaged(path, str(error)) from None
        if (negative_UC.shape, negative_UC.dtype) != (shape, np.dtype(np.int32)):
            found = f"{negative_UC.dtype} of shape {negative_UC.shape}"
            raise _damaged(path, f"it holds {found}, but the manifest says int32 of shape {shape}")
        check_unchanged(self.path, self.manifest.file(f"candidates/{name}.npy"))
        return negative_UC

    def candidates_of(self, kind: CandidateSet, split: Split, user_U: IntArray) -> IntArray:
        """Stored negatives of these users, (U, C).

        Raises:
            DatasetError: as in `candidates`, or items that are not in the catalog.
        """
        negative_UC = self.candidates(kind, split)[user_U]
        if negative_UC.size and not 1 <= negative_UC.min() <= negative_UC.max() <= self.num_items:
            path = self.path / "candidates" / f"{kind}-{split}.npy"
            raise _damaged(path, f"it holds items that are not between 1 and {self.num_items}")
        return negative_UC

    def texts(self, *columns: Text) -> list[tuple[str, ...]]:
        """Text columns of items 1 to N, one tuple per item; "" for what the catalog (or an older build of it) lacks.

        Read at each call and not kept: most systems need titles only, and every loader process holds a copy of this
        object.

        Raises:
            DatasetError: the catalog is damaged.
        """
        return list(zip(*read_catalog(self.path, self.manifest.num_items, columns), strict=True))


def read_user_ids(path: Path) -> list[str]:
    """Raw user ids in the order of user indices.

    Raises:
        DatasetError: the table of users is damaged.
    """
    file_path = path / USERS_NAME
    try:
        with file_path.open("rb") as file, pq.ParquetFile(file) as table:
            _check_columns(table, "user", ["raw_id"])
            users = table.read(columns=["user", "raw_id"])
        users.validate(full=True)  # or bytes that are not UTF-8 would go unnoticed
        user_U = users["user"].to_numpy()
        order = np.argsort(user_U, kind="stable")
        if users["raw_id"].null_count or not np.array_equal(user_U[order], np.arange(len(user_U))):
            raise ValueError("it does not number its users from 0")
        raw_ids: list[str] = users["raw_id"].take(order).to_pylist()
    except _UNREADABLE as error:
        raise _damaged(file_path, str(error)) from None
    return raw_ids


def open_dataset(
    path: Path, *, full_check: bool, manifest: Manifest | None = None, repeat_dates: RepeatDates = "own"
) -> Dataset:
    """Open a folder written by `python -m shards build`.

    Args:
        full_check: compare the sha256 of every file with the manifest; otherwise compare file sizes only.
        manifest: the folder's manifest, if it was already read and the file sizes were already checked.

    Raises:
        DatasetError: the folder is not a dataset, or a file does not match the manifest.
    """
    given, manifest = manifest, manifest or read_manifest(path)
    if full_check:
        verify(path, manifest)
    elif not given:
        check_sizes(path, manifest)
    [titles] = read_catalog(path, manifest.num_items, ["title"])
    return Dataset(path, manifest, tuple(titles), repeat_dates)


_UNREADABLE = (OSError, ValueError, KeyError, TypeError, pa.ArrowException)
_SMALL = 64 << 20
"""A table may decode to this many bytes, however well it is compressed."""


def read_catalog(path: Path, num_items: int, columns: Sequence[Column]) -> list[list[str]]:
    """Columns of the catalog in the order of item ids; a column that it lacks is "" everywhere.

    Raises:
        DatasetError: it is damaged, or does not have items 1 to N.
    """
    file_path = path / CATALOG_NAME
    try:
        # Opened here: a library that is given a name may take it for a pattern or an address. Texts stay references to
        # the distinct ones, which are measured before they are expanded.
        with file_path.open("rb") as file, pq.ParquetFile(file, read_dictionary=list(columns)) as table:
            if table.metadata.num_rows != num_items:  # before anything is allocated
                raise ValueError(f"it has {table.metadata.num_rows} items, but the manifest says {num_items}")
            there = [name for name in columns if name in table.schema_arrow.names]
            _check_columns(table, "item", there)
            catalog = table.read(columns=["item", *there])
        catalog.validate(full=True)  # or bytes that are not UTF-8 would go unnoticed
        size = sum(_text_bytes(chunk) for name in there for chunk in catalog[name].chunks)
        if size > max(_SMALL, MAX_EXPANSION * file_path.stat().st_size):
            raise ValueError(f"its texts would take {size:,} bytes")
    except _UNREADABLE as error:
        raise _damaged(file_path, str(error)) from None
    item_N = catalog["item"].to_numpy()
    order = np.argsort(item_N, kind="stable")
    if not np.array_equal(item_N[order], np.arange(1, num_items + 1)):
        raise DatasetError(f"{file_path} does not number items 1 to {num_items}: rebuild the dataset")
    if missing := [name for name in there if catalog[name].null_count]:
        raise _damaged(file_path, f"an item has no {missing[0]}")
    return [catalog[name].take(order).to_pylist() if name in there else [""] * num_items for name in columns]


def _check_columns(table: pq.ParquetFile, number: str, texts: Sequence[str]) -> None:
    """Check that the file has each of these columns once, with the right type, and says to decode to no more than is
    allowed.

    Raises:
        ValueError: it does not.
    """
    metadata, schema = table.metadata, table.schema_arrow
    for name in (number, *texts):
        if len(places := schema.get_all_field_indices(name)) != 1:
            raise ValueError(f"it has {len(places)} columns {name!r}")
        kind = schema.field(name).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if kind not in ((pa.int32(),) if name == number else (pa.string(), pa.large_string())):
            raise ValueError(f"its column {name!r} is {kind}")
    groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
    columns = [group.column(place) for group in groups for place in range(group.num_columns)]
    if sum(column.total_uncompressed_size for column in columns) > max(
        _SMALL, MAX_EXPANSION * sum(column.total_compressed_size for column in columns)
    ):
        raise ValueError("it would decode to far more than its size")


def _text_bytes(texts: pa.DictionaryArray) -> int:
    """Bytes that the texts take once each row has its own copy."""
    return int(pc.sum(pc.binary_length(texts.dictionary).take(texts.indices)).as_py() or 0)


def _damaged(path: Path, what: str) -> DatasetError:
    reason = " ".join(what.split())[:200]
    return DatasetError(f"{path} is damaged ({reason}): copy the dataset again or rebuild it")
