"""A recommender with its collator and scoring, and helpers shared by the builders of all systems."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from trainer.config import ConfigError
from trainer.data.collators.base import Collator, HistoryBatch, TrainingCollator, to_device
from trainer.data.curriculum import Curriculum
from trainer.data.reading.counter_rng import IntArray
from trainer.data.reading.dataset import Dataset
from trainer.data.reading.shards import read_in_order
from trainer.models.interface import Recommender, VectorRecommender
from trainer.models.scoring import TitleScoring, VectorScoring
from trainer.nn.module import Module
from trainer.nn.saved_buffers import saved_buffers
from trainer.runs.folder import Checkpoint, CheckpointError, Identity

TrainBatchT = TypeVar("TrainBatchT")
TermsT = TypeVar("TermsT", bound=NamedTuple)
HistoryBatchT = TypeVar("HistoryBatchT", bound=HistoryBatch)
ItemBatchT = TypeVar("ItemBatchT")


@dataclass(frozen=True)
class EpochItems(Generic[ItemBatchT]):
    """Item vectors that are recomputed when an epoch starts and stay fixed until the next epoch."""

    batch: Callable[[IntArray], ItemBatchT]
    """Builds a batch from item ids: the collator's `items`."""
    encode: Callable[[ItemBatchT], Tensor]
    """Encodes such a batch to vectors (M, D)."""
    keep: Callable[[Tensor], None]
    """Receives the vectors (N, D) of items 1 to N."""

    def vectors(self, item_M: IntArray, device: torch.device) -> Tensor:
        """(M, D) vectors of these items, in fp32."""
        return self.encode(to_device(self.batch(item_M), device)).float()


@dataclass(frozen=True)
class System(Generic[TrainBatchT, TermsT]):
    """A recommender ready to be trained or evaluated."""

    model: Recommender[TrainBatchT, TermsT]
    collator: TrainingCollator[TrainBatchT]
    scoring: VectorScoring[Any, Any] | TitleScoring
    """How the system scores items; holds the same model."""
    llm: str = ""
    """Fingerprint of the language model or text encoder that the system starts from; empty without one."""
    built_on: Mapping[str, str] = field(default_factory=dict)
    """sha256 of the weights of each run that the system builds on, by key (`teacher`, ...)."""
    initialize: Callable[[torch.device], None] | None = None
    """Initialises the model of a new run before the first step, by passes on its device; parameters may be on the host
    meanwhile (`engine/sharding.py`). Not called on resume."""
    epoch_items: EpochItems[Any] | None = None
    """Item vectors recomputed per epoch; None: the model has no such vectors."""
    curriculum: Curriculum[TrainBatchT] | None = None
    """Easier prompts for early steps; None: the same kind of batches throughout."""

    @property
    def vectors(self) -> VectorScoring[Any, Any]:
        """The scoring, for callers that search the catalog by vectors.

        Raises:
            ValueError: the system scores titles and has no vectors.
        """
        match self.scoring:
            case VectorScoring() as scoring:
                return scoring
            case TitleScoring():
                raise ValueError("a system of task=generation has no vectors: train one with task=retrieval")


AnySystem = System[Any, Any]
"""A system of the registry; only its builder knows the types of its batches."""


def vector_system(
    model: VectorRecommender[TrainBatchT, TermsT, HistoryBatchT, ItemBatchT],
    collator: Collator[TrainBatchT, HistoryBatchT, ItemBatchT],
    *,
    costly_items: bool = False,
    llm: str = "",
    built_on: Mapping[str, str] | None = None,
    initialize: Callable[[torch.device], None] | None = None,
    epoch_items: EpochItems[ItemBatchT] | None = None,
    curriculum: Curriculum[TrainBatchT] | None = None,
) -> System[TrainBatchT, TermsT]:
    """Build a system that scores by user and item vectors.

    Args:
        costly_items: see `VectorScoring`; the other keywords are fields of `System`.
    """
    scoring = VectorScoring(model, collator, costly_items)
    return System(model, collator, scoring, llm, built_on or {}, initialize, epoch_items, curriculum)


def changed_dependency(identity: Identity, system: AnySystem) -> str | None:
    """The first dependency ("teacher", ...) that is not the one the checkpoint was written with; None: all are."""
    if identity.llm != system.llm:
        return "language model or encoder"
    keys = sorted({*identity.built_on, *system.built_on})
    return next((key for key in keys if identity.built_on.get(key) != system.built_on.get(key)), None)


def load_weights(model: Module, checkpoint: Checkpoint) -> None:
    """Load a checkpoint's weights, which are all trained parameters and saved buffers, into the model.

    Raises:
        CheckpointError: names or shapes differ.
    """
    weights = load_file(checkpoint.weights)
    trained: dict[str, Tensor] = {name: value for name, value in model.named_parameters() if value.requires_grad}
    trained |= saved_buffers(model)
    mismatched = sorted(set(weights) ^ set(trained))
    mismatched += [name for name in trained if name in weights and trained[name].shape != weights[name].shape]
    if mismatched:
        raise CheckpointError(
            f"{checkpoint.path} does not fit the model: {mismatched[0]} differs; is it from a different run?"
        )
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(weights[name])


def check_negatives(dataset: Dataset, *, key: str, needed: int, seen: int | None) -> None:
    """Check that every user leaves `needed` items of the catalog to draw negatives from.

    Without the check a run would stop at the first batch with a user who leaves too few. An exported run has no users
    and draws no negatives.

    Args:
        key: the setting that needs them, for example `system.negatives=4`.
        seen: negatives avoid the last `seen` items of a history; None: the whole training sequence.

    Raises:
        ConfigError: a user leaves too few.
    """
    if not dataset.has_users:
        return
    # The longest sequence is a cheap bound, from the manifest: only tiny catalogs need their users counted.
    if dataset.num_items - dataset.manifest.statistics.max_length >= needed:
        return
    left = dataset.num_items - _most_distinct_items(dataset, seen)
    if left < needed:
        raise ConfigError(
            f"{key} needs {needed} items outside a user's history, but one user leaves only {left} of the "
            f"{dataset.num_items} items of {dataset.path}: lower it, or build a dataset with more items"
        )


def _most_distinct_items(dataset: Dataset, seen: int | None) -> int:
    """Largest number of distinct items in a training sequence, or in the last `seen` items of its history."""
    most = 0
    for users in read_in_order(dataset.path, dataset.manifest):
        histories = users.train if seen is None else users.train.without_last().last(seen)
        row_E = np.repeat(np.arange(len(histories)), histories.length_U)
        # One integer per (user, item), to count each pair once.
        pair = np.unique(row_E * (dataset.num_items + 1) + histories.item_E)
        most = max(most, int(np.bincount(pair // (dataset.num_items + 1), minlength=1).max()))
    return most
