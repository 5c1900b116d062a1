"""Builder of the systems around a large language model: assembles the parts that a system's variant lists."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from trainer.config import LLM4RecConfig, LLMSRecConfig, RunConfig, SASRecConfig
from trainer.data.collators.base import ItemIds, to_device
from trainer.data.collators.generation import TitleCollator
from trainer.data.collators.negatives import OFFICIAL_HISTORY
from trainer.data.collators.retrieval import RetrievalCollator
from trainer.data.collators.sequences import SequenceCollator
from trainer.data.collators.targets import Floats, expected_targets
from trainer.data.curriculum import Curriculum
from trainer.data.prompts.packing import PackedPrompts, pack
from trainer.data.prompts.prefix_cache_index import PrefixCacheIndex
from trainer.data.prompts.prompt import Prompt
from trainer.data.prompts.row_packing import pack_rows
from trainer.data.prompts.templates import prompt_template
from trainer.data.prompts.tokenization import TextTokens
from trainer.data.prompts.writer import PromptWriter
from trainer.data.reading.counter_rng import IntArray, permutation
from trainer.data.reading.dataset import Dataset
from trainer.data.reading.shards import read_in_order
from trainer.models.by_id.build import load_teacher, sequence_collator
from trainer.models.by_id.sasrec import SASRec
from trainer.models.by_text.build import load_stage1
from trainer.models.llm.distillation import Distillation
from trainer.models.llm.generation import TitleGenerator
from trainer.models.llm.prompt_reader import PromptReader
from trainer.models.llm.readout_init import standardize
from trainer.models.llm.retrieval import LLM4Rec
from trainer.models.llm.titled_teacher import TitledTeacher
from trainer.models.llm.variants import Variant, variant_of
from trainer.models.scoring import TitleScoring
from trainer.models.system import AnySystem, System, check_negatives, vector_system
from trainer.nn.dropout import TokenHashes
from trainer.nn.llm.backbone import FrozenLLM, check_llm, llm_fingerprint, load_llm, load_tokenizer, needs_groups
from trainer.nn.llm.lm_head import load_lm_head
from trainer.nn.llm.prefix_cache import open_prefix_cache
from trainer.nn.projectors import encoded_item_projector, item_projector, shared_projector, user_projector
from trainer.runs.requirements import Sources

ProjectorInit = Literal["xavier", "token_scale"]

_SAMPLE = 96  # users, and items, whose read-outs are standardized: takes a few seconds on a CPU
_ITEM_PROJECTOR = "reader.item_projector."  # prefix of its parameters' names in the model


def build_llm4rec(config: RunConfig, system: LLM4RecConfig, dataset: Dataset, sources: Sources) -> AnySystem:
    """Build TALLRec, LLaRA, CoLLM, A-LLMRec or LLM-SRec around the frozen LLM, for the run's task."""
    _check_candidates(config, system, dataset)
    frozen = _load_frozen(sources, dataset)
    check_llm(system.llm)
    if config.task == "generation":
        return _build_generation(config, system, dataset, frozen)
    return _build_retrieval(config, system, dataset, frozen)


def _build_generation(config: RunConfig, system: LLM4RecConfig, dataset: Dataset, frozen: FrozenParts) -> AnySystem:
    reader = build_reader(load_llm(system.llm), variant_of(system), frozen, system.projector_init)
    model = TitleGenerator(reader, load_lm_head(system.llm, reader.llm))
    collator = _title_collator(config, system, dataset, frozen.teacher_config, grouped=needs_groups(system.llm))
    return System(
        model,
        collator,
        TitleScoring(model, collator),
        llm=llm_fingerprint(system.llm),
        built_on=frozen.sha256,
        curriculum=_curriculum(config, system, dataset, collator, choices=1 + collator.negatives),
    )


def _build_retrieval(config: RunConfig, system: LLM4RecConfig, dataset: Dataset, frozen: FrozenParts) -> AnySystem:
    writer = prompt_writer(system, dataset)
    cached = _cached_prefixes(system, writer, dataset)
    collator = _retrieval_collator(
        config, system, dataset, frozen.teacher_config, writer, cached, grouped=needs_groups(system.llm)
    )
    variant = variant_of(system)
    llm = load_llm(system.llm)
    frozen = replace(frozen, teacher=_with_titles(frozen.teacher, system, dataset, llm))
    reader = build_reader(llm, variant, frozen, system.projector_init)
    if system.llm.title_store is not None and cached is not None:
        reader.llm.cache_ML2hd = open_prefix_cache(
            Path(system.llm.title_store), system.llm, cached, verify=config.data.verify
        )
    model = LLM4Rec(system, reader, build_distillation(variant, frozen))
    initialize = None
    if system.readout_init == "standardized":
        initialize = partial(_standardize_readouts, model, collator, dataset, config)
    return vector_system(
        model,
        collator,
        costly_items=True,
        llm=llm_fingerprint(system.llm),
        built_on=frozen.sha256,
        initialize=initialize,
        curriculum=_curriculum(config, system, dataset, collator),
    )


def _check_candidates(config: RunConfig, system: LLM4RecConfig, dataset: Dataset) -> None:
    shown = system.max_history + system.max_vector_items
    seen = None if system.negative_policy == "exclude_user" else max(OFFICIAL_HISTORY, shown)
    key, needed = f"system.train_candidates={system.train_candidates}", _own_candidates(system) - 1
    if system.train_candidates == "batch":
        key = f"system.batch_negatives={needed}"
    if config.task == "generation":
        needed = dataset.manifest.title_negatives
        key = f"the dataset's --title-negatives={needed}"
    check_negatives(dataset, key=key, needed=needed, seen=seen)


def _own_candidates(system: LLM4RecConfig) -> int:
    """The target and its sampled negatives."""
    return 1 + system.batch_negatives if system.train_candidates == "batch" else system.train_candidates


def _target_shares(config: RunConfig, system: LLM4RecConfig, dataset: Dataset) -> Floats:
    """(N,) how often each item is a target, as a share of all targets; reads all shards once."""
    order = config.data.training_order
    count_N = sum(
        expected_targets(
            users.in_training_order(order, system.max_history, config.seed).train,
            system.targets,
            max_history=system.max_history,
            num_items=dataset.num_items,
        )
        for users in read_in_order(dataset.path, dataset.manifest)
    )
    assert isinstance(count_N, np.ndarray), "a dataset has users"
    share_N: Floats = count_N / count_N.sum()
    return share_N


def prompt_collator(
    config: RunConfig, system: LLM4RecConfig, dataset: Dataset, teacher: SASRecConfig | None
) -> RetrievalCollator | TitleCollator:
    """The system's collator for the run's task; needs the tokenizer, but no weights. Its batches run on any device."""
    if config.task == "generation":
        return _title_collator(config, system, dataset, teacher, grouped=True)
    writer = prompt_writer(system, dataset)
    cached = _cached_prefixes(system, writer, dataset)
    return _retrieval_collator(config, system, dataset, teacher, writer, cached, grouped=True)


def _cached_prefixes(system: LLM4RecConfig, writer: PromptWriter, dataset: Dataset) -> PrefixCacheIndex | None:
    return None if system.llm.title_store is None else PrefixCacheIndex.of_items(writer, dataset.num_items)


def _retrieval_collator(
    config: RunConfig,
    system: LLM4RecConfig,
    dataset: Dataset,
    teacher: SASRecConfig | None,
    writer: PromptWriter,
    rows: PrefixCacheIndex | None,
    *,
    grouped: bool,
) -> RetrievalCollator:
    in_batch = system.train_candidates == "batch"
    return RetrievalCollator(
        writer=writer,
        teacher=_sequences(config, system, dataset, teacher),
        num_items=dataset.num_items,
        shown_history=system.max_history + system.max_vector_items,
        max_vector_items=system.max_vector_items,
        candidates=_own_candidates(system),
        target_share_N=_target_shares(config, system, dataset) if in_batch and dataset.has_users else None,
        exclude_user=system.negative_policy == "exclude_user",
        targets=system.targets,
        pack=_packing(system, rows.by_prefix if rows else None, grouped=grouped),
        seed=config.seed,
    )


def _title_collator(
    config: RunConfig, system: LLM4RecConfig, dataset: Dataset, teacher: SASRecConfig | None, *, grouped: bool
) -> TitleCollator:
    return TitleCollator(
        writer=prompt_writer(system, dataset, choices=1 + dataset.manifest.title_negatives),
        teacher=_sequences(config, system, dataset, teacher),
        num_items=dataset.num_items,
        shown_history=system.max_history + system.max_vector_items,
        max_vector_items=system.max_vector_items,
        negatives=dataset.manifest.title_negatives,
        exclude_user=system.negative_policy == "exclude_user",
        pack=_packing(system, grouped=grouped),
        seed=config.seed,
    )


def prompt_writer(system: LLM4RecConfig, dataset: Dataset, choices: int = 0) -> PromptWriter:
    """The writer of the system's prompts; `choices` is the number of candidates that a generation prompt lists."""
    return _writer(system, variant_of(system), dataset, choices)


def _curriculum(
    config: RunConfig,
    system: LLM4RecConfig,
    dataset: Dataset,
    collator: RetrievalCollator | TitleCollator,
    choices: int = 0,
) -> Curriculum[Any] | None:
    """LLaRA's curriculum: the same batches with prompts of titles alone, which do not use the item projector.

    Args:
        choices: number of candidates that a generation prompt lists.
    """
    variant = variant_of(system)
    if variant.curriculum_steps is None:
        return None
    writer = _writer(system, replace(variant, items="titles"), dataset, choices)
    return Curriculum(replace(collator, writer=writer), variant.curriculum_steps, _ITEM_PROJECTOR, config.seed)


def _writer(system: LLM4RecConfig, variant: Variant, dataset: Dataset, choices: int) -> PromptWriter:
    return PromptWriter(
        load_tokenizer(system.llm),
        dataset.titles,
        prompt_template(system.prompt, item_slots=variant.item_slots, user_vector=variant.user_vector),
        max_title_tokens=system.llm.max_title_tokens,
        max_tokens=system.llm.max_tokens,
        choices=choices,
    )


def _sequences(
    config: RunConfig, system: LLM4RecConfig, dataset: Dataset, teacher: SASRecConfig | None
) -> SequenceCollator | None:
    """The collator of the teacher's sequences; None where nothing uses its user vectors."""
    variant = variant_of(system)
    wanted = variant.user_vector or variant.distillation
    return sequence_collator(teacher, dataset, config.seed) if teacher and wanted else None


def _packing(
    system: LLM4RecConfig, cached: Mapping[bytes, IntArray] | None = None, *, grouped: bool
) -> Callable[[Sequence[Prompt]], PackedPrompts]:
    if system.llm.packing == "rows":
        return partial(pack_rows, row_tokens=system.llm.max_tokens)
    # LoRA trains weights inside the decoder, so nothing of a prompt can run without gradient.
    return partial(pack, frozen_prefix=variant_of(system).lora is None, cached=cached, grouped=grouped)


@dataclass(frozen=True)
class FrozenParts:
    """Frozen models of the runs that a system builds on, and the sha256 of their weights by key."""

    teacher: SASRec | TitledTeacher | None
    encoder: nn.Module | None
    """A-LLMRec's stage-1 item encoder, from rows of the teacher's item table (M, dim) to (M, latent_dim)."""
    sha256: dict[str, str]

    @property
    def teacher_config(self) -> SASRecConfig | None:
        teacher = self.teacher.sasrec if isinstance(self.teacher, TitledTeacher) else self.teacher
        return teacher.config if teacher else None


def _load_frozen(sources: Sources, dataset: Dataset) -> FrozenParts:
    if sources.teacher is None:
        return FrozenParts(None, None, {})
    teacher = load_teacher(sources.teacher, dataset.num_items)
    sha256 = {"teacher": sources.teacher.checkpoint.weights_sha256}
    if sources.a_llmrec_stage1 is None:
        return FrozenParts(teacher, None, sha256)
    encoder = load_stage1(sources.a_llmrec_stage1, sources.teacher)
    return FrozenParts(teacher, encoder, sha256 | {"stage1": sources.a_llmrec_stage1.checkpoint.weights_sha256})


def _with_titles(
    teacher: SASRec | TitledTeacher | None, system: LLM4RecConfig, dataset: Dataset, llm: FrozenLLM
) -> SASRec | TitledTeacher | None:
    if not isinstance(system, LLMSRecConfig) or not system.teacher_titles:
        return teacher
    assert isinstance(teacher, SASRec), "LLM-SRec has a teacher"
    titles = title_tokens(system, dataset)
    return TitledTeacher(teacher, llm.token_table(), titles, weight=system.teacher_titles, latest=system.max_history)


def title_tokens(system: LLM4RecConfig, dataset: Dataset) -> list[list[int]]:
    """Token ids of each item's title, as in the prompts."""
    tokens = TextTokens(load_tokenizer(system.llm)).inside_all(dataset.titles)
    return [ids[: system.llm.max_title_tokens] for ids in tokens]


def build_reader(
    llm: FrozenLLM, variant: Variant, frozen: FrozenParts, projector_init: ProjectorInit = "xavier"
) -> PromptReader:
    """The frozen LLM with the projectors and adapters that the variant trains."""
    teacher = frozen.teacher
    f_items: nn.Module | None = None
    f_users: nn.Module | None = None
    if teacher is not None:
        dim = teacher.dim
        f_items = item_projector(dim, llm.dim)
        f_users = user_projector(dim, llm.dim) if variant.user_vector else None
        if frozen.encoder is not None:
            encoded_1Z = frozen.encoder(torch.zeros(1, dim))  # a dummy row, for the encoder's output width
            f_items = nn.Sequential(frozen.encoder, encoded_item_projector(encoded_1Z.shape[1], llm.dim))
        if variant.shared_projector:
            f_items = f_users = shared_projector(dim, llm.dim)
        if projector_init == "token_scale":
            _scale_to_tokens({f for f in (f_items, f_users) if f is not None}, teacher, llm)
    adapters: TokenHashes | None = None
    if variant.lora:
        from trainer.nn.llm.lora import add_adapters  # peft takes seconds to import

        adapters = add_adapters(llm, variant.lora)
    return PromptReader(
        llm,
        teacher=teacher,
        item_projector=f_items,
        user_projector=f_users,
        adapters=adapters,
        teacher_dropout=variant.distillation is not None and variant.distillation.teacher_dropout,
    )


@torch.no_grad()
def _scale_to_tokens(projectors: set[nn.Module], teacher: SASRec | TitledTeacher, llm: FrozenLLM) -> None:
    """Scale projectors so that their vectors of all items have the standard deviation of the LLM's token embeddings."""
    row_Nd = teacher.item_vectors(ItemIds(torch.arange(1, teacher.num_items + 1)))
    for projector in projectors:
        last = [layer for layer in projector.modules() if isinstance(layer, nn.Linear)][-1]
        last.bias.zero_()
        last.weight.mul_(llm.token_table().float().std().cpu() / projector(row_Nd).std())


def build_distillation(variant: Variant, frozen: FrozenParts) -> Distillation | None:
    """The losses against the teacher's user vector, where the variant has them."""
    if variant.distillation is None:
        return None
    assert frozen.teacher is not None, "a variant with distillation has a teacher"
    return Distillation(variant.distillation, frozen.teacher.dim)


def _standardize_readouts(
    model: LLM4Rec, collator: RetrievalCollator, dataset: Dataset, config: RunConfig, device: torch.device
) -> None:
    """Standardize on the dataset's first users and on random items, `_SAMPLE` of each."""
    first = next(read_in_order(dataset.path, dataset.manifest)).trained().take(slice(0, _SAMPLE))
    trained = first.dated(dataset.repeat_dates).in_training_order(
        config.data.training_order, collator.max_history, config.seed
    )
    users, batch_size = trained.train.without_last(), config.evaluation.batch_size
    item_M = 1 + permutation(dataset.num_items, 0)[:_SAMPLE]
    batches = [slice(first, first + batch_size) for first in range(0, _SAMPLE, batch_size)]
    standardize(
        model,
        [to_device(collator.histories(users.take(batch)), device) for batch in batches if batch.start < len(users)],
        [to_device(collator.items(item_M[batch]), device) for batch in batches if batch.start < len(item_M)],
    )
