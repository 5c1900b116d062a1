"""Builder of the systems around a large language model: parts by the system's row, put together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from trainer.config import ALLMRecConfig, LLM4RecConfig, LLMConfig, RunConfig, SASRecConfig, built_on
from trainer.data.collators.base import to_device
from trainer.data.collators.generation import TitleCollator
from trainer.data.collators.retrieval import RetrievalCollator
from trainer.data.collators.sequences import SequenceCollator
from trainer.data.curriculum import Curriculum
from trainer.data.prompts.packing import PackedPrompts, pack
from trainer.data.prompts.prefix_cache_index import TitleRows
from trainer.data.prompts.prompt import Prompt
from trainer.data.prompts.row_packing import pack_rows
from trainer.data.prompts.templates import wording
from trainer.data.prompts.writer import PromptWriter
from trainer.data.reading.counter_rng import IntArray, permutation
from trainer.data.reading.dataset import Dataset
from trainer.data.reading.shards import read_in_order
from trainer.models.by_id.build import load_teacher, sequence_collator
from trainer.models.by_id.sasrec import SASRec
from trainer.models.by_text.build_a_llmrec import load_stage1
from trainer.models.llm.distillation import Distillation
from trainer.models.llm.generation import TitleChooser
from trainer.models.llm.prompt_reader import PromptReader
from trainer.models.llm.retrieval import LLM4Rec
from trainer.models.llm.variants import Row, row_of
from trainer.models.system import System, check_negatives
from trainer.nn.dropout import TokenAddress
from trainer.nn.llm.backbone import check_llm, llm_fingerprint, load_llm, load_tokenizer
from trainer.nn.llm.lm_head import load_lm_head
from trainer.nn.llm.prefix_cache import open_store
from trainer.nn.projectors import encoded_item_projector, item_projector, shared_projector, user_projector

_SAMPLE = 96  # users and items that standardize the read-outs: a few seconds on a CPU
_ITEM_PROJECTOR = "reader.item_projector."  # in the names of the model's parameters


def build_llm4rec(config: RunConfig, system: LLM4RecConfig, dataset: Dataset) -> System:
    """TALLRec, LLaRA, CoLLM, A-LLMRec or LLM-SRec around the frozen LLM."""
    _check_candidates(config, system, dataset)
    frozen = _load_frozen(system, dataset)
    check_llm(system.llm)
    row = row_of(system)
    teacher = frozen.teacher.config if frozen.teacher else None
    if config.task == "generation":
        reader = _build_reader(system.llm, row, frozen)
        chooser = TitleChooser(reader, load_lm_head(system.llm, reader.llm))
        titles = _title_collator(config, system, dataset, teacher)
        easier = _curriculum(config, system, dataset, titles)
        return System(chooser, titles, llm_fingerprint(system.llm), frozen.sha256, curriculum=easier)
    writer = prompt_writer(system, dataset)
    rows = _stored_rows(system, writer, dataset)
    collator = _retrieval_collator(config, system, dataset, teacher, writer, rows)
    reader = _build_reader(system.llm, row, frozen)
    if system.llm.title_store is not None and rows is not None:
        reader.llm.store_ML2hd = open_store(Path(system.llm.title_store), system.llm, rows, verify=config.data.verify)
    model = LLM4Rec(system, reader, _build_distillation(row, frozen))
    initialize = None
    if system.readout_init == "standardized":
        initialize = partial(_standardize_readouts, model, collator, dataset, config.evaluation.batch_size)
    easier = _curriculum(config, system, dataset, collator)
    return System(model, collator, llm_fingerprint(system.llm), frozen.sha256, initialize, curriculum=easier)


def _check_candidates(config: RunConfig, system: LLM4RecConfig, dataset: Dataset) -> None:
    seen = None if system.negative_policy == "exclude_user" else system.max_history
    key, needed = f"system.train_candidates={system.train_candidates}", system.train_candidates - 1
    if config.task == "generation":
        needed = dataset.manifest.title_negatives
        key = f"the dataset's --title-negatives={needed}"
    check_negatives(dataset, key=key, needed=needed, seen=seen)


def prompt_collator(
    config: RunConfig, system: LLM4RecConfig, dataset: Dataset, teacher: SASRecConfig | None
) -> RetrievalCollator | TitleCollator:
    """What feeds the system in the run's task; needs the tokenizer and no weights."""
    if config.task == "generation":
        return _title_collator(config, system, dataset, teacher)
    writer = prompt_writer(system, dataset)
    return _retrieval_collator(config, system, dataset, teacher, writer, _stored_rows(system, writer, dataset))


def _stored_rows(system: LLM4RecConfig, writer: PromptWriter, dataset: Dataset) -> TitleRows | None:
    return None if system.llm.title_store is None else TitleRows.of_items(writer, dataset.num_items)


def _retrieval_collator(
    config: RunConfig,
    system: LLM4RecConfig,
    dataset: Dataset,
    teacher: SASRecConfig | None,
    writer: PromptWriter,
    rows: TitleRows | None,
) -> RetrievalCollator:
    return RetrievalCollator(
        writer=writer,
        teacher=_sequences(config, system, dataset, teacher),
        num_items=dataset.num_items,
        max_history=system.max_history,
        candidates=system.train_candidates,
        exclude_user=system.negative_policy == "exclude_user",
        targets=system.targets,
        pack=_packing(system, rows.by_beginning if rows else None),
        seed=config.seed,
    )


def _title_collator(
    config: RunConfig, system: LLM4RecConfig, dataset: Dataset, teacher: SASRecConfig | None
) -> TitleCollator:
    return TitleCollator(
        writer=prompt_writer(system, dataset, choices=1 + dataset.manifest.title_negatives),
        teacher=_sequences(config, system, dataset, teacher),
        num_items=dataset.num_items,
        max_history=system.max_history,
        negatives=dataset.manifest.title_negatives,
        exclude_user=system.negative_policy == "exclude_user",
        pack=_packing(system),
        seed=config.seed,
    )


def prompt_writer(system: LLM4RecConfig, dataset: Dataset, choices: int = 0) -> PromptWriter:
    """Writes the system's prompts; `choices` is the number of candidates that it lists in generation."""
    return _writer(system, row_of(system), dataset, choices)


def _curriculum(
    config: RunConfig, system: LLM4RecConfig, dataset: Dataset, collator: RetrievalCollator | TitleCollator
) -> Curriculum | None:
    """The same batches with prompts of titles alone, which the item projector has no part in."""
    row = row_of(system)
    if row.curriculum_steps is None:
        return None
    choices = 1 + collator.negatives if isinstance(collator, TitleCollator) else 0
    writer = _writer(system, replace(row, items="titles"), dataset, choices)
    return Curriculum(replace(collator, writer=writer), row.curriculum_steps, _ITEM_PROJECTOR, config.seed)


def _writer(system: LLM4RecConfig, row: Row, dataset: Dataset, choices: int) -> PromptWriter:
    return PromptWriter(
        load_tokenizer(system.llm),
        dataset.titles,
        wording(system.prompt, item_slots=row.item_slots, user_vector=row.user_vector),
        max_title_tokens=system.llm.max_title_tokens,
        max_tokens=system.llm.max_tokens,
        choices=choices,
    )


def _sequences(
    config: RunConfig, system: LLM4RecConfig, dataset: Dataset, teacher: SASRecConfig | None
) -> SequenceCollator | None:
    """What the teacher reads, where the system uses its user vectors."""
    row = row_of(system)
    wanted = row.user_vector or row.distillation
    return sequence_collator(teacher, dataset, config.seed) if teacher and wanted else None


def _packing(
    system: LLM4RecConfig, stored: Mapping[bytes, IntArray] | None = None
) -> Callable[[Sequence[Prompt]], PackedPrompts]:
    if system.llm.packing == "rows":
        return partial(pack_rows, row_tokens=system.llm.max_tokens)
    return partial(pack, frozen_prefix=row_of(system).lora is None, stored=stored)


@dataclass(frozen=True)
class _Frozen:
    """Models of other runs that a system is built on, and the sha256 of their weights by key."""

    teacher: SASRec | None
    encoder: nn.Module | None
    """A-LLMRec's item encoder."""
    sha256: dict[str, str]


def _load_frozen(system: LLM4RecConfig, dataset: Dataset) -> _Frozen:
    path = built_on(system).get("teacher")
    if path is None:
        return _Frozen(None, None, {})
    teacher, digest = load_teacher(path, dataset)
    if not isinstance(system, ALLMRecConfig):
        return _Frozen(teacher, None, {"teacher": digest})
    encoder, stage1_digest = load_stage1(system.stage1, dataset, digest)
    return _Frozen(teacher, encoder, {"teacher": digest, "stage1": stage1_digest})


def _build_reader(config: LLMConfig, row: Row, frozen: _Frozen) -> PromptReader:
    llm, teacher = load_llm(config), frozen.teacher
    of_items: nn.Module | None = None
    of_users: nn.Module | None = None
    if teacher is not None:
        dim = teacher.config.dim
        of_items = item_projector(dim, llm.dim)
        of_users = user_projector(dim, llm.dim) if row.user_vector else None
        if frozen.encoder is not None:
            encoded_1Z = frozen.encoder(torch.zeros(1, dim))
            of_items = nn.Sequential(frozen.encoder, encoded_item_projector(encoded_1Z.shape[1], llm.dim))
        if row.shared_projector:
            of_items = of_users = shared_projector(dim, llm.dim)
    adapters: TokenAddress | None = None
    if row.lora:
        from trainer.nn.llm.lora import add_adapters  # peft takes seconds

        adapters = add_adapters(llm, row.lora)
    return PromptReader(
        llm,
        teacher=teacher,
        item_projector=of_items,
        user_projector=of_users,
        adapters=adapters,
        teacher_dropout=row.distillation is not None and row.distillation.teacher_dropout,
    )


def _build_distillation(row: Row, frozen: _Frozen) -> Distillation | None:
    if row.distillation is None:
        return None
    assert frozen.teacher is not None, "what distills has a teacher"
    return Distillation(row.distillation, frozen.teacher.config.dim)


def _standardize_readouts(
    model: LLM4Rec, collator: RetrievalCollator, dataset: Dataset, batch_size: int, device: torch.device
) -> None:
    users = next(read_in_order(dataset.path, dataset.manifest)).take(slice(0, _SAMPLE)).train.without_last()
    item_M = 1 + permutation(dataset.num_items, 0)[:_SAMPLE]
    batches = [slice(first, first + batch_size) for first in range(0, _SAMPLE, batch_size)]
    model.to(device).standardize_readouts(
        [to_device(collator.histories(users.take(batch)), device) for batch in batches if batch.start < len(users)],
        [to_device(collator.items(item_M[batch]), device) for batch in batches if batch.start < len(item_M)],
    )
