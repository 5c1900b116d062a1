"""The registry: from a configuration to a model and the collator that feeds it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from trainer.config import LLMSRecConfig, RunConfig, SASRecConfig
from trainer.config.runs import Checkpoint, CheckpointError, RunFolder
from trainer.data.batches import Collator, PromptCollator, SequenceCollator
from trainer.data.catalog import Dataset
from trainer.data.prompts import WORDINGS, PromptWriter
from trainer.data.randomness import torch_seed
from trainer.models.llm_srec import LLMSRec
from trainer.models.sasrec import SASRec
from trainer.nn.backbone import llm_fingerprint, load_llm, load_tokenizer


@dataclass(frozen=True)
class System:
    """A recommender ready to be trained or evaluated."""

    model: nn.Module
    collator: Collator[Any, Any, Any]
    llm: str = ""
    """Fingerprint of the frozen LLM; empty without one."""
    teacher: str = ""
    """sha256 of the teacher's weights; empty without one."""


def build_system(config: RunConfig, dataset: Dataset) -> System:
    """The system that `config.system` names, initialised from `config.seed`.

    Raises:
        ValueError: something it needs is missing or does not fit (LLM, teacher, titles); the message has the cure.
    """
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
    return System(model, collator, llm=llm_fingerprint(system.llm), teacher=teacher_sha256)


def _load_teacher(path: Path, dataset: Dataset) -> tuple[SASRec, str]:
    run = RunFolder(path)
    if not (path / "config.yaml").is_file():
        raise CheckpointError(
            f"no teacher at {path}: train one first, for example with trainer/presets/sasrec.yaml output={path}"
        )
    config = run.config()
    if not isinstance(config.system, SASRecConfig):
        raise CheckpointError(f"{path} holds a {config.system.name}, but system.teacher must be a sasrec run")
    checkpoint = run.best()
    if checkpoint.identity.catalog_sha256 != dataset.manifest.catalog_sha256:
        raise CheckpointError(
            f"the teacher {path} was trained on another catalog than {dataset.path}: "
            "train a teacher on this dataset, or set data.path to the teacher's"
        )
    teacher = SASRec(config.system, dataset.num_items)
    load_weights(teacher, checkpoint)
    return teacher, checkpoint.weights_sha256
