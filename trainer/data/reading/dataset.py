"""The dataset's files that are not streamed: item titles, raw user ids, evaluation candidates."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl

from shards.manifest import DatasetError, Manifest, check_sizes, read_manifest, verify
from trainer.config import Split
from trainer.data.reading.counter_rng import IntArray

CandidateSet = Literal["retrieval", "title"]
"""The stored negatives of retrieval, or those of title generation."""
Text = Literal["title", "description", "brand", "category"]


@dataclass(frozen=True)
class Dataset:
    """An open dataset: its manifest, checked against the files, and its catalog."""

    path: Path
    manifest: Manifest
    titles: tuple[str, ...]
    """`titles[i - 1]` is the title of item i."""

    @property
    def num_items(self) -> int:
        return self.manifest.num_items

    def candidates(self, kind: CandidateSet, split: Split) -> IntArray:
        """The stored negatives of every user, (U, C), memory-mapped; row = user."""
        path = self.path / "candidates" / f"{kind}-{split}.npy"
        negative_UC: IntArray = np.load(path, mmap_mode="r", allow_pickle=False)
        if len(negative_UC) != self.manifest.num_users:
            raise DatasetError(
                f"{path} holds {len(negative_UC)} users, the manifest {self.manifest.num_users}: build it again"
            )
        return negative_UC

    def texts(self, *columns: Text) -> list[tuple[str, ...]]:
        """These texts of items 1 to N, one tuple an item; "" what the catalog lacks (or an older build did not keep).

        Read anew each time: most systems need titles alone, and loader processes hold a copy of the dataset.
        """
        catalog = pl.read_parquet(self.path / "catalog.parquet").sort("item")
        there = [pl.col(name) if name in catalog.columns else pl.lit("").alias(name) for name in columns]
        return catalog.select(there).rows()


def find_user(path: Path, raw_id: str) -> int:
    """The number of a dataset's user from the id in the reviews.

    Raises:
        DatasetError: no such user survived the filters.
    """
    found = pl.scan_parquet(path / "users.parquet").filter(pl.col("raw_id") == raw_id).collect()
    if found.is_empty():
        raise DatasetError(
            f"user {raw_id!r} is not in {path}: it is not in the reviews or has too few of them; "
            f"{path / 'users.parquet'} lists the users"
        )
    return int(found["user"][0])


def open_dataset(path: Path, *, full_check: bool, manifest: Manifest | None = None) -> Dataset:
    """Open a folder written by `python -m shards build`.

    Args:
        full_check: compare the sha256 of every file with the manifest; otherwise only the sizes.
        manifest: the folder's, where it was read and the sizes were checked already.

    Raises:
        DatasetError: the folder is no dataset or a file does not match the manifest.
    """
    known, manifest = manifest, manifest or read_manifest(path)
    if full_check:
        verify(path, manifest)
    elif not known:
        check_sizes(path, manifest)
    catalog = pl.read_parquet(path / "catalog.parquet", columns=["item", "title"]).sort("item")
    if catalog["item"].to_list() != list(range(1, manifest.num_items + 1)):
        raise DatasetError(f"{path / 'catalog.parquet'} does not number items 1 to {manifest.num_items}: build again")
    return Dataset(path, manifest, tuple(catalog["title"].to_list()))
