"""A run's results on another dataset than that which it was trained on; torch-free."""

from __future__ import annotations

from pathlib import Path

from shards.manifest import Manifest, check_sizes, read_manifest
from trainer.config.choices import UnseenItems
from trainer.config.load import ConfigError
from trainer.runs.folder import RunFolder


def check_other(data: Path, own: Manifest) -> Manifest:
    """The manifest of another dataset.

    Raises:
        ValueError: not a dataset, or one with the run's own items.
    """
    manifest = read_manifest(data)
    check_sizes(data, manifest)
    if manifest.catalog_sha256 == own.catalog_sha256:
        raise ConfigError(f"{data} has the items that the run was trained on: give a dataset of another domain")
    return manifest


def is_own(data: Path, run: Path) -> bool:
    """Whether a folder holds the dataset that a run was trained on.

    Raises:
        ValueError: not a dataset, or not a run folder with a best checkpoint.
    """
    return read_manifest(data).fingerprint == RunFolder(run).best().identity.dataset_fingerprint


def folder_elsewhere(run: Path, fingerprint: str, unseen: UnseenItems) -> Path:
    """Folder in a run folder of its results on another dataset."""
    return run / "elsewhere" / f"{fingerprint[:12]}-{unseen}"
