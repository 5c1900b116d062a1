"""The registry: from a configuration to a model and the collator that feeds it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from trainer.config import ConfigError, LLMSRecConfig, RunConfig, SASRecConfig
from trainer.config.needs import teacher_run
from trainer.config.runs import Checkpoint, CheckpointError
from trainer.data.batches import Collator, PromptCollator, SequenceCollator, to_device
from trainer.data.catalog import Dataset
from trainer.data.prompts import WORDINGS, PromptWriter
from trainer.data.randomness import permutation, torch_seed
from trainer.data.stream import read_in_order
from trainer.models.llm_srec import LLMSRec
from trainer.models.sasrec import SASRec
from trainer.nn.backbone import check_llm, llm_fingerprint, load_llm, load_tokenizer

_SAMPLE = 96  # users and items that standardize the read-outs: a few seconds on a CPU


@dataclass(frozen=True)
class System:
    """A recommender ready to be trained or evaluated."""

    model: nn.Module
    collator: Collator[Any, Any, Any]
    llm: str = ""
    """Fingerprint of the frozen LLM; empty without one."""
    teacher: str = ""
    """sha256 of the teacher's weights; empty without one."""
    initialize: Callable[[torch.device], None] | None = None
    """What a new run does to the model, once it is on its device, before the first step; not when it resumes."""


def build_system(config: RunConfig, dataset: Dataset) -> System:
    """The system that `config.system` names, initialised from `config.seed`.

    Raises:
        ValueError: something it needs is missing or does not fit (LLM, teacher, titles); the message has the cure.
    """
    _check_negatives(config, dataset)
    torch.manual_seed(torch_seed(config.seed, 0))
    if isinstance(config.system, SASRecConfig):
        return System(SASRec(config.system, dataset.num_items), _sequences(config.system, dataset, config.seed))
    return _llm_srec(config, config.system, dataset)


def load_weights(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Put a checkpoint's weights, which are those of all trained parameters, into the model.

    Raises:
        CheckpointError: they do not fit.
    """
    weights = load_file(checkpoint.weights)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    wrong = sorted(set(weights) ^ set(trained))
    wrong += [name for name in trained if name in weights and trained[name].shape != weights[name].shape]
    if wrong:
        raise CheckpointError(f"{checkpoint.path} does not fit the model: {wrong[0]} differs; is it of another run?")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(weights[name])


def _sequences(config: SASRecConfig, dataset: Dataset, seed: int) -> SequenceCollator:
    return SequenceCollator(
        num_items=dataset.num_items,
        max_history=config.max_length,
        negatives=config.negatives,
        fixed_length=not config.mask_padding,
        seed=seed,
    )


def _llm_srec(config: RunConfig, system: LLMSRecConfig, dataset: Dataset) -> System:
    teacher, teacher_sha256 = _load_teacher(system.teacher, dataset)
    check_llm(system.llm)
    tokenizer = load_tokenizer(system.llm)
    writer = PromptWriter(
        tokenizer,
        dataset.titles,
        WORDINGS[system.prompt],
        max_title_tokens=system.llm.max_title_tokens,
        row_tokens=system.llm.row_tokens,
    )
    collator = PromptCollator(
        writer=writer,
        teacher=_sequences(teacher.config, dataset, config.seed),
        num_items=dataset.num_items,
        max_history=system.max_history,
        candidates=system.train_candidates,
        exclude_user=system.negative_policy == "exclude_user",
        row_tokens=system.llm.row_tokens,
        seed=config.seed,
    )
    model = LLMSRec(system, load_llm(system.llm), teacher)
    initialize = None
    if system.readout_init == "standardized":
        initialize = partial(_standardize_readouts, model, collator, dataset, config.evaluation.batch_size)
    return System(model, collator, llm_fingerprint(system.llm), teacher_sha256, initialize)


def _standardize_readouts(
    model: LLMSRec, collator: PromptCollator, dataset: Dataset, batch_size: int, device: torch.device
) -> None:
    users = next(read_in_order(dataset.path, dataset.manifest)).take(slice(0, _SAMPLE)).train.without_last()
    item_M = 1 + permutation(dataset.num_items, 0)[:_SAMPLE]
    batches = [slice(first, first + batch_size) for first in range(0, _SAMPLE, batch_size)]
    model.to(device).standardize_readouts(
        [to_device(collator.histories(users.take(batch)), device) for batch in batches if batch.start < len(users)],
        [to_device(collator.items(item_M[batch]), device) for batch in batches if batch.start < len(item_M)],
    )


def _load_teacher(path: Path, dataset: Dataset) -> tuple[SASRec, str]:
    config, checkpoint = teacher_run(path, dataset.path, dataset.manifest)
    teacher = SASRec(config, dataset.num_items)
    load_weights(teacher, checkpoint)
    return teacher, checkpoint.weights_sha256


def _check_negatives(config: RunConfig, dataset: Dataset) -> None:
    """Every user must leave enough of the catalog to draw negatives from.

    Raises:
        ConfigError: one leaves too little; otherwise the run would stop at the first batch with such a user.
    """
    system = config.system
    if isinstance(system, SASRecConfig):
        if system.loss == "gbce" and system.negatives > dataset.num_items - 1:
            raise ConfigError(
                f"system.negatives={system.negatives}, but gbce can use at most {dataset.num_items - 1}, "
                f"one less than {dataset.path} has items: lower it"
            )
        # Positions may share negatives, so that one item is enough for all.
        key, needed, seen = f"system.negatives={system.negatives}", 1, None
    else:
        key, needed = f"system.train_candidates={system.train_candidates}", system.train_candidates - 1
        seen = None if system.negative_policy == "exclude_user" else system.max_history
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
