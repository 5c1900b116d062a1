"""A recommender with all that surrounds it, and what the builders of all systems share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from trainer.config import ConfigError
from trainer.data.collators.generation import AnyCollator
from trainer.data.curriculum import Curriculum
from trainer.data.reading.dataset import Dataset
from trainer.data.reading.shards import read_in_order
from trainer.nn.saved_buffers import carried
from trainer.runs.folder import Checkpoint, CheckpointError, Identity


@dataclass(frozen=True)
class EpochItems:
    """Item vectors that are computed anew when an epoch starts and stay fixed until the next one."""

    encode: Callable[[Any], Tensor]
    """From the collator's `items` batch to vectors (M, D)."""
    keep: Callable[[Tensor], None]
    """Takes those of items 1 to N."""


@dataclass(frozen=True)
class System:
    """A recommender ready to be trained or evaluated."""

    model: nn.Module
    collator: AnyCollator
    llm: str = ""
    """Fingerprint of the language model or text encoder that it starts from; empty without one."""
    built_on: Mapping[str, str] = field(default_factory=dict)
    """sha256 of the weights of each run it builds on, by key (`teacher`, ...)."""
    initialize: Callable[[torch.device], None] | None = None
    """What a new run does to the model, once it is on its device, before the first step; not when it resumes."""
    epoch_items: EpochItems | None = None
    curriculum: Curriculum | None = None


def changed_part(identity: Identity, system: System) -> str | None:
    """What the system is built on now and was not when the checkpoint was written: "teacher", ..."""
    if identity.llm != system.llm:
        return "language model or encoder"
    keys = sorted({*identity.built_on, *system.built_on})
    return next((key for key in keys if identity.built_on.get(key) != system.built_on.get(key)), None)


def load_weights(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Put a checkpoint's weights, which are all trained parameters and carried tables, into the model.

    Raises:
        CheckpointError: they do not fit.
    """
    weights = load_file(checkpoint.weights)
    trained: dict[str, Tensor] = {name: value for name, value in model.named_parameters() if value.requires_grad}
    trained |= carried(model)
    wrong = sorted(set(weights) ^ set(trained))
    wrong += [name for name in trained if name in weights and trained[name].shape != weights[name].shape]
    if wrong:
        raise CheckpointError(f"{checkpoint.path} does not fit the model: {wrong[0]} differs; is it of another run?")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(weights[name])


def check_negatives(dataset: Dataset, *, key: str, needed: int, seen: int | None) -> None:
    """Every user must leave `needed` items of the catalog to draw negatives from.

    Args:
        key: what the user set, for example `system.negatives=4`.
        seen: negatives avoid the last `seen` items of a history; None: the whole training sequence.

    Raises:
        ConfigError: one leaves too little; otherwise the run would stop at the first batch with such a user.
    """
    # A bound from the manifest first: only tiny catalogs need their users counted.
    if dataset.num_items - dataset.manifest.statistics.max_length >= needed:
        return
    left = dataset.num_items - _most_items_of_a_user(dataset, seen)
    if left < needed:
        raise ConfigError(
            f"{key} needs {needed} items that a user has not in his history, but one user leaves only {left} of the "
            f"{dataset.num_items} items of {dataset.path}: lower it, or build a dataset with more items"
        )


def _most_items_of_a_user(dataset: Dataset, seen: int | None) -> int:
    """The largest number of different items in a training sequence, or in the last `seen` of its history."""
    most = 0
    for users in read_in_order(dataset.path, dataset.manifest):
        histories = users.train if seen is None else users.train.without_last().last(seen)
        row_E = np.repeat(np.arange(len(histories)), histories.length_U)
        pair = np.unique(row_E * (dataset.num_items + 1) + histories.item_E)
        most = max(most, int(np.bincount(pair // (dataset.num_items + 1), minlength=1).max()))
    return most
