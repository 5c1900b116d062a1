"""The paper's Movies, Scientific, Electronics and CDs, preprocessed as by its code (SeqRec/sasrec/data_preprocess.py).

From the 5-core leave-last-out files of Amazon Reviews 2023, a part of the users is drawn with seed 0; then, in one
pass, items and users with fewer than five events are dropped, and users with fewer than five training items. Ratings
are ignored.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

from shards.manifest import DatasetError, Manifest
from shards.remote.download import download
from shards.statistics import paper_row

log = logging.getLogger("shards")

HUB = "https://huggingface.co/datasets/McAuley-Lab/Amazon-Reviews-2023/resolve/main"
"""Serves the sha256 of each file. The same paths are below
https://mcauleylab.ucsd.edu/public_datasets/data/amazon_2023, compressed (`.gz`)."""


@dataclass(frozen=True)
class PaperDataset:
    """A dataset of Table 10: its name there, Amazon's category, and the part of the users that are kept."""

    name: str
    category: str
    user_fraction: float

    @property
    def files(self) -> tuple[str, ...]:
        """Paths of the three splits and of the metadata, below `HUB`."""
        splits = tuple(f"benchmark/5core/last_out/{self.category}.{split}.csv" for split in ("train", "valid", "test"))
        return (*splits, f"raw/meta_categories/meta_{self.category}.jsonl")


PAPER_DATASETS = {
    "scientific": PaperDataset("Scientific", "Industrial_and_Scientific", 1.0),
    "movies": PaperDataset("Movies", "Movies_and_TV", 0.05),
    "electronics": PaperDataset("Electronics", "Electronics", 0.05),
    "cds": PaperDataset("CDs", "CDs_and_Vinyl", 0.33),
}


def raw_files(dataset: PaperDataset, raw: Path, *, download_from: str | None = None) -> tuple[list[Path], list[Path]]:
    """The review files and the metadata files of a dataset below the folder `raw`.

    Args:
        download_from: address below which missing files are fetched from; None reports them instead.

    Raises:
        DatasetError: a file is missing, with where it comes from, or cannot be fetched.
    """
    found = {file: _find(raw, Path(file).name) for file in dataset.files}
    meta = dataset.files[-1]
    if not found[meta]:  # the hub's own conversion of the metadata
        found[meta] = sorted(raw.rglob(f"raw_meta_{dataset.category}/*.parquet"))
    missing = [file for file, paths in found.items() if not paths]
    if missing and download_from is None:
        places = ", ".join(f"{Path(file).name} from {HUB}/{file}" for file in missing)
        raise DatasetError(
            f"{raw} has not all files of {dataset.name}; missing (as they are or gzipped): {places}: put them there, "
            "or add --download"
        )
    for file in missing:
        found[file] = [raw / Path(file).name]
        download(f"{str(download_from).rstrip('/')}/{file}", found[file][0])
    return [found[file][0] for file in dataset.files[:-1]], found[meta]


def against_table_10(manifest: Manifest) -> list[str]:
    """Lines that compare the counts with those of the paper; none for other datasets."""
    row = paper_row(manifest.name)
    if row is None:
        return []
    lines = []
    for name in ("users", "items", "interactions"):
        paper, built = getattr(row, name), getattr(manifest.statistics, name)
        verdict = "equal" if paper == built else f"{built - paper:+,} ({built / paper - 1:+.2%})"
        lines.append(f"{name}: {built:,}, in Table 10 of the paper {paper:,}: {verdict}")
    return lines


def _find(raw: Path, name: str) -> list[Path]:
    """The file anywhere below the folder, as it is or gzipped; the shortest path if there are several."""
    paths = [path for pattern in (name, f"{name}.gz") for path in raw.rglob(pattern) if path.is_file()]
    return sorted(paths, key=lambda path: (len(path.parts), path))[:1]
