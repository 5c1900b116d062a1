"""Builders of the systems that know items by number."""

from __future__ import annotations

from pathlib import Path

from trainer.config import ConfigError, RunConfig, SASRecConfig
from trainer.config.needs import teacher_run
from trainer.data.batches import SequenceCollator
from trainer.data.catalog import Dataset
from trainer.models.sasrec import SASRec
from trainer.models.system import System, check_negatives, load_weights


def build_sasrec(config: RunConfig, system: SASRecConfig, dataset: Dataset) -> System:
    """SASRec from scratch."""
    if system.loss == "gbce" and system.negatives > dataset.num_items - 1:
        raise ConfigError(
            f"system.negatives={system.negatives}, but gbce can use at most {dataset.num_items - 1}, "
            f"one less than {dataset.path} has items: lower it"
        )
    # Positions may share negatives, so that one item is enough for all.
    check_negatives(dataset, key=f"system.negatives={system.negatives}", needed=1, seen=None)
    return System(SASRec(system, dataset.num_items), sequence_collator(system, dataset, config.seed))


def sequence_collator(system: SASRecConfig, dataset: Dataset, seed: int) -> SequenceCollator:
    """What feeds a SASRec."""
    return SequenceCollator(
        num_items=dataset.num_items,
        max_history=system.max_length,
        negatives=system.negatives,
        fixed_length=not system.mask_padding,
        seed=seed,
    )


def load_teacher(path: Path, dataset: Dataset) -> tuple[SASRec, str]:
    """The trained SASRec of a run, and the sha256 of its weights.

    Raises:
        ValueError: see `teacher_run`.
    """
    config, checkpoint = teacher_run(path, dataset.path, dataset.manifest)
    teacher = SASRec(config, dataset.num_items)
    load_weights(teacher, checkpoint)
    return teacher, checkpoint.weights_sha256
