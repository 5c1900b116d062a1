"""Builders of the systems around a large language model."""

from __future__ import annotations

from functools import partial

import torch

from trainer.config import LLMSRecConfig, RunConfig, SASRecConfig
from trainer.data.batches import PromptCollator, to_device
from trainer.data.catalog import Dataset
from trainer.data.prompts import WORDINGS, PromptWriter
from trainer.data.randomness import permutation
from trainer.data.stream import read_in_order
from trainer.models.build_ids import load_teacher, sequence_collator
from trainer.models.llm_srec import LLMSRec
from trainer.models.system import System, check_negatives
from trainer.nn.backbone import check_llm, llm_fingerprint, load_llm, load_tokenizer

_SAMPLE = 96  # users and items that standardize the read-outs: a few seconds on a CPU


def build_llm_srec(config: RunConfig, system: LLMSRecConfig, dataset: Dataset) -> System:
    """LLM-SRec around the frozen LLM and the frozen teacher."""
    seen = None if system.negative_policy == "exclude_user" else system.max_history
    key = f"system.train_candidates={system.train_candidates}"
    check_negatives(dataset, key=key, needed=system.train_candidates - 1, seen=seen)
    teacher, teacher_sha256 = load_teacher(system.teacher, dataset)
    check_llm(system.llm)
    collator = prompt_collator(config, system, dataset, teacher.config)
    model = LLMSRec(system, load_llm(system.llm), teacher)
    initialize = None
    if system.readout_init == "standardized":
        initialize = partial(_standardize_readouts, model, collator, dataset, config.evaluation.batch_size)
    return System(model, collator, llm_fingerprint(system.llm), {"teacher": teacher_sha256}, initialize)


def prompt_collator(
    config: RunConfig, system: LLMSRecConfig, dataset: Dataset, teacher: SASRecConfig
) -> PromptCollator:
    """What feeds the system; needs the tokenizer and no weights."""
    tokenizer = load_tokenizer(system.llm)
    writer = PromptWriter(
        tokenizer,
        dataset.titles,
        WORDINGS[system.prompt],
        max_title_tokens=system.llm.max_title_tokens,
        max_tokens=system.llm.max_tokens,
    )
    return PromptCollator(
        writer=writer,
        teacher=sequence_collator(teacher, dataset, config.seed),
        num_items=dataset.num_items,
        max_history=system.max_history,
        candidates=system.train_candidates,
        exclude_user=system.negative_policy == "exclude_user",
        row_tokens=system.llm.max_tokens if system.llm.packing == "rows" else None,
        seed=config.seed,
    )


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
