"""Dataset files that are not streamed: item titles, raw user ids, evaluation candidates."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl

from shards.manifest import DatasetError, Manifest, check_sizes, check_unchanged, read_manifest, verify
from trainer.config import Split
from trainer.data.reading.counter_rng import IntArray

CandidateSet = Literal["retrieval", "title"]
"""Which stored negatives: those of retrieval, or those of title generation."""
Text = Literal["title", "description", "brand", "category"]
"""Text columns of the catalog."""


@dataclass(frozen=True)
class Dataset:
    """An open dataset: its manifest, checked against the files, and its item titles."""

    path: Path
    manifest: Manifest
    titles: tuple[str, ...]
    """`titles[i - 1]` is the title of item i."""

    @property
    def num_items(self) -> int:
        return self.manifest.num_items

    def candidates(self, kind: CandidateSet, split: Split) -> IntArray:
        """Stored negatives of all users, (U, C), memory-mapped; row u belongs to user index u.

        Raises:
            DatasetError: the number of rows is not the manifest's number of users, or the file was replaced.
        """
        name = f"candidates/{kind}-{split}.npy"
        path = self.path / name
        negative_UC: IntArray = np.load(path, mmap_mode="r", allow_pickle=False)
        if len(negative_UC) != self.manifest.num_users:
            raise DatasetError(
                f"{path} holds {len(negative_UC)} users, but the manifest says {self.manifest.num_users}: "
                "copy the dataset again or rebuild it"
            )
        check_unchanged(self.path, self.manifest.file(name))
        return negative_UC

    def texts(self, *columns: Text) -> list[tuple[str, ...]]:
        """Text columns of items 1 to N, one tuple per item; "" for what the catalog (or an older build of it) lacks.

        Read at each call and not kept: most systems need titles only, and every loader process holds a copy of this
        object.
        """
        catalog = pl.read_parquet(self.path / "catalog.parquet").sort("item")
        selected = [pl.col(name) if name in catalog.columns else pl.lit("").alias(name) for name in columns]
        return catalog.select(selected).rows()


def find_user(path: Path, raw_id: str) -> int:
    """User index of the raw user id that the reviews use.

    Raises:
        DatasetError: no user with this raw id passed the filters.
    """
    found = pl.scan_parquet(path / "users.parquet").filter(pl.col("raw_id") == raw_id).collect()
    if found.is_empty():
        raise DatasetError(
            f"user {raw_id!r} is not in {path}: no review has this user id, or too few do; "
            f"{path / 'users.parquet'} lists the users"
        )
    return int(found["user"][0])


def open_dataset(path: Path, *, full_check: bool, manifest: Manifest | None = None) -> Dataset:
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
    catalog = pl.read_parquet(path / "catalog.parquet", columns=["item", "title"]).sort("item")
    if catalog["item"].to_list() != list(range(1, manifest.num_items + 1)):
        raise DatasetError(
            f"{path / 'catalog.parquet'} does not number items 1 to {manifest.num_items}: rebuild the dataset"
        )
    return Dataset(path, manifest, tuple(catalog["title"].to_list()))
