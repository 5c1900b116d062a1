"""A run's results on another dataset than that which it was trained on; torch-free."""

from __future__ import annotations

from pathlib import Path

from shards.manifest import Manifest, check_sizes, read_manifest
from trainer.config.choices import UnseenItems
from trainer.config.load import ConfigError


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


def folder_elsewhere(run: Path, fingerprint: str, unseen: UnseenItems) -> Path:
    """Folder in a run folder of its results on another dataset."""
    return run / "elsewhere" / f"{fingerprint[:12]}-{unseen}"
