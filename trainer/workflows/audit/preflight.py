"""Checks of an audit before torch is imported."""

from __future__ import annotations

from pathlib import Path

from trainer.config import ConfigError
from trainer.runs.preflight import SavedRun, check_saved_run
from trainer.runs.requirements import check_recommends


def check_audited(path: Path, trained_shuffled: Path | None) -> tuple[SavedRun, SavedRun | None]:
    """Check a run that is audited, and the run that was trained on shuffled histories, if any.

    Raises:
        ValueError: one of them cannot be evaluated or has no vectors, or they differ in dataset or system.
    """
    saved = check_saved_run(path)
    check_recommends(saved.config)
    if trained_shuffled is None:
        return saved, None
    other = check_saved_run(trained_shuffled)
    check_recommends(other.config)
    if other.manifest.fingerprint != saved.manifest.fingerprint:
        raise ConfigError(f"{trained_shuffled} and {path} were trained on different datasets: train both on one")
    if other.config.system.name != saved.config.system.name:
        raise ConfigError(
            f"{trained_shuffled} is a run of {other.config.system.name}, but {path} of {saved.config.system.name}: "
            "compare runs that differ in the order of their training histories alone"
        )
    return saved, other
