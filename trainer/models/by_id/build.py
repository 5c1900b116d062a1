"""Builders of the systems that know items by id alone."""

from __future__ import annotations

from trainer.config import BERT4RecConfig, ConfigError, GRU4RecConfig, NextItNetConfig, RunConfig, SASRecConfig
from trainer.data.collators.masking import MaskingCollator
from trainer.data.collators.sequences import SequenceCollator
from trainer.data.collators.shared_negatives import SharedNegativeCollator
from trainer.data.reading.dataset import Dataset
from trainer.models.by_id.bert4rec import BERT4Rec
from trainer.models.by_id.gru4rec import GRU4Rec
from trainer.models.by_id.nextitnet import NextItNet
from trainer.models.by_id.sasrec import SASRec
from trainer.models.system import AnySystem, check_negatives, load_weights, vector_system
from trainer.runs.requirements import SourceRun


def build_sasrec(config: RunConfig, system: SASRecConfig, dataset: Dataset) -> AnySystem:
    """Build an untrained SASRec and its collator."""
    return vector_system(new_sasrec(system, dataset), sequence_collator(system, dataset, config.seed))


def new_sasrec(system: SASRecConfig, dataset: Dataset) -> SASRec:
    """An untrained SASRec for the items of a dataset.

    Raises:
        ConfigError: the catalog has too few items for `system.negatives`.
    """
    if system.loss == "gbce" and system.negatives > dataset.num_items - 1:
        raise ConfigError(
            f"system.negatives={system.negatives}, but gbce can use at most {dataset.num_items - 1}, "
            f"one less than the items of {dataset.path}: lower it"
        )
    if system.loss != "full_softmax":
        # Positions may draw the same negatives, so that one item is enough for all.
        check_negatives(dataset, key=f"system.negatives={system.negatives}", needed=1, seen=None)
    return SASRec(system, dataset.num_items)


def build_gru4rec(config: RunConfig, system: GRU4RecConfig, dataset: Dataset) -> AnySystem:
    """Build an untrained GRU4Rec and its collator."""
    negatives = 0 if system.loss == "full_softmax" else system.negatives
    check_negatives(dataset, key=f"system.negatives={system.negatives}", needed=negatives, seen=None)
    sequences = _catalog_collator(dataset, system.max_length, config.seed)
    return vector_system(GRU4Rec(system, dataset.num_items), SharedNegativeCollator(sequences, negatives))


def build_bert4rec(config: RunConfig, system: BERT4RecConfig, dataset: Dataset) -> AnySystem:
    """Build an untrained BERT4Rec and its collator."""
    collator = MaskingCollator(
        num_items=dataset.num_items,
        max_length=system.max_length,
        mask_share=system.mask_share,
        last_item_share=system.last_item_share,
        seed=config.seed,
    )
    return vector_system(BERT4Rec(system, dataset.num_items), collator)


def build_nextitnet(config: RunConfig, system: NextItNetConfig, dataset: Dataset) -> AnySystem:
    """Build an untrained NextItNet and its collator."""
    collator = _catalog_collator(dataset, system.max_length, config.seed)
    return vector_system(NextItNet(system, dataset.num_items), collator)


def _catalog_collator(dataset: Dataset, max_length: int, seed: int) -> SequenceCollator:
    """Collator of sequences without negatives, for losses over the whole catalog."""
    return SequenceCollator(dataset.num_items, max_length, negatives=0, fixed_length=False, seed=seed)


def sequence_collator(system: SASRecConfig, dataset: Dataset, seed: int) -> SequenceCollator:
    """The collator of a SASRec."""
    return SequenceCollator(
        num_items=dataset.num_items,
        max_history=system.max_length,
        negatives=0 if system.loss == "full_softmax" else system.negatives,
        fixed_length=not system.mask_padding,
        seed=seed,
    )


def load_teacher(run: SourceRun[SASRecConfig], num_items: int) -> SASRec:
    """Load the trained SASRec of a run."""
    teacher = SASRec(run.system, num_items)
    load_weights(teacher, run.checkpoint)
    return teacher
