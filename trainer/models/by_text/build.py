"""Builders of the systems that read text: A-LLMRec's stage 1, CTRL, RECFORMER."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import nn

from trainer.config import ConfigError, RunConfig, SASRecConfig
from trainer.config.text_systems import (
    ALLMRecStage1Config,
    CTRLAlignConfig,
    CTRLConfig,
    RecformerConfig,
    RecformerPretrainConfig,
)
from trainer.data.collators.item_texts import HistoryTextCollator, ItemPairCollator
from trainer.data.collators.sentences import (
    FinetuneBatches,
    PretrainBatches,
    SentenceCollator,
    SentencePairs,
    SentenceTraining,
)
from trainer.data.encoder_texts import TokenLists, history_writer, tokenize
from trainer.data.item_sentences import SentenceWriter, sentence_writer
from trainer.data.reading.dataset import Dataset
from trainer.models.by_id.build import load_teacher, new_sasrec, sequence_collator
from trainer.models.by_id.sasrec import SASRec
from trainer.models.by_text.a_llmrec_stage1 import ALLMRecStage1, AutoEncoder
from trainer.models.by_text.ctrl import CTRLAlign, TextItems, start_from_text
from trainer.models.by_text.encoding import check_same_encoder, encode_texts, weights_below
from trainer.models.by_text.recformer import Recformer, RecformerPretrain, SentenceEncoder
from trainer.models.system import AnySystem, EpochItems, check_negatives, vector_system
from trainer.nn.saved_buffers import SavedTable
from trainer.nn.text_encoder import (
    TextVectors,
    check_encoder,
    encoder_fingerprint,
    encoder_width,
    load_encoder,
    load_encoder_tokenizer,
)
from trainer.runs.folder import CheckpointError
from trainer.runs.requirements import SectionT, SourceRun, Sources

_LONGFORMER_WINDOW = 64  # tokens, as in RECFORMER


def build_a_llmrec_stage1(
    config: RunConfig, system: ALLMRecStage1Config, dataset: Dataset, sources: Sources
) -> AnySystem:
    """Build stage 1 of A-LLMRec on a frozen SASRec."""
    check_negatives(dataset, key="A-LLMRec's stage 1", needed=1, seen=None)
    assert sources.teacher is not None, "stage 1 has a teacher"
    teacher = load_teacher(sources.teacher, dataset.num_items)
    check_encoder(system.encoder, system.max_tokens, "system.max_tokens")
    tokenizer = load_encoder_tokenizer(system.encoder)
    written = dataset.texts("title", "description")
    texts = tokenize(tokenizer, [f'"{", ".join(filter(None, parts))}"' for parts in written], system.max_tokens)
    reader = TextVectors(load_encoder(system.encoder, dropout=system.dropout), system.pooling)
    model = ALLMRecStage1(system, teacher, reader)
    initialize = None
    if not system.train_encoder:
        kept = SavedTable(dataset.num_items + 1, reader.encoder.dim)
        model = ALLMRecStage1(system, teacher, kept)
        initialize = partial(_keep_text_vectors, kept, reader, texts, config.evaluation.batch_size)
    collator = ItemPairCollator(
        sequence_collator(teacher.config, dataset, config.seed), texts, dataset.num_items, config.seed
    )
    return vector_system(
        model,
        collator,
        llm=encoder_fingerprint(system.encoder),
        built_on={"teacher": sources.teacher.checkpoint.weights_sha256},
        initialize=initialize,
    )


def load_stage1(run: SourceRun[ALLMRecStage1Config], teacher: SourceRun[SASRecConfig]) -> nn.Module:
    """Load the frozen item encoder of a stage-1 run, for stage 2 of A-LLMRec.

    Args:
        teacher: run of the SASRec whose item vectors will be encoded.

    Returns:
        A module from rows of the teacher's item table (M, D) to latent vectors (M, latent_dim).

    Raises:
        CheckpointError: stage 1 was trained on a different teacher.
    """
    if run.checkpoint.identity.built_on.get("teacher") != teacher.checkpoint.weights_sha256:
        raise CheckpointError(
            f"system.stage1={run.path} was trained on a different teacher than system.teacher: "
            f"set system.teacher={run.system.teacher}, or train stage 1 on yours"
        )
    weights = weights_below("item_coder.", run.checkpoint)
    coder = AutoEncoder(weights["decode.weight"].shape[0], run.system.latent_dim)
    coder.load_state_dict(weights)
    return coder.encode.requires_grad_(False)


def _keep_text_vectors(
    table: SavedTable, reader: TextVectors, texts: TokenLists, batch_size: int, device: torch.device
) -> None:
    """Fill rows 1 to N of the table with text vectors; row 0, padding, is zero."""
    vector_NF = encode_texts(reader, texts, batch_size, device)
    table.to(device).replace(torch.cat([torch.zeros_like(vector_NF[:1]), vector_NF]))


def build_ctrl(config: RunConfig, system: CTRLConfig, dataset: Dataset, sources: Sources) -> AnySystem:
    """Build CTRL: a SASRec whose items start from text vectors, or that continues an alignment run."""
    backbone = _text_backbone(system, dataset)
    collator = sequence_collator(system.backbone, dataset, config.seed)
    fingerprint = encoder_fingerprint(system.encoder)
    aligned = sources.ctrl_align
    if aligned is None:
        initialize = partial(_start_backbone, backbone, system, dataset, config.evaluation.batch_size)
        return vector_system(backbone, collator, llm=fingerprint, initialize=initialize)
    check_same_encoder("aligned", aligned, fingerprint)
    backbone.load_state_dict(weights_below("backbone.", aligned.checkpoint))
    return vector_system(backbone, collator, llm=fingerprint, built_on={"aligned": aligned.checkpoint.weights_sha256})


def build_ctrl_align(config: RunConfig, system: CTRLAlignConfig, dataset: Dataset) -> AnySystem:
    """Build CTRL's alignment: a SASRec whose items start from text vectors, beside the frozen text encoder."""
    backbone = _text_backbone(system, dataset)
    sequences = sequence_collator(system.backbone, dataset, config.seed)
    writer = history_writer(
        load_encoder_tokenizer(system.encoder),
        dataset.titles,
        max_tokens=system.max_tokens,
        max_history=system.max_history,
    )
    check_encoder(system.encoder, writer.longest, "system.max_history x system.max_tokens")
    model = CTRLAlign(system, backbone, TextVectors(load_encoder(system.encoder), system.pooling))
    initialize = partial(_start_backbone, backbone, system, dataset, config.evaluation.batch_size)
    collator = HistoryTextCollator(sequences, writer, config.seed)
    fingerprint = encoder_fingerprint(system.encoder)
    return vector_system(model, collator, costly_items=True, llm=fingerprint, initialize=initialize)


def _text_backbone(system: CTRLConfig | CTRLAlignConfig, dataset: Dataset) -> SASRec:
    """CTRL's SASRec, with the kind of item table that `system.adapter` names."""
    check_encoder(system.encoder, system.max_tokens, "system.max_tokens")
    width, dim = encoder_width(system.encoder), system.backbone.dim
    if dim > width or dim >= dataset.num_items:
        limit = min(width, dataset.num_items - 1)
        raise ConfigError(
            f"system.backbone.dim={dim}, but the text vectors of {dataset.num_items} items with {width} dimensions "
            f"have at most {limit} components: set it to {limit} or less"
        )
    backbone = new_sasrec(system.backbone, dataset)
    if system.adapter == "linear":
        backbone.add_module("items", TextItems(dataset.num_items + 1, width, dim))
    return backbone


def _start_backbone(
    backbone: SASRec,
    system: CTRLConfig | CTRLAlignConfig,
    dataset: Dataset,
    batch_size: int,
    device: torch.device,
) -> None:
    """Initialise the backbone's items from the text vectors of titles."""
    reader = TextVectors(load_encoder(system.encoder), system.pooling)
    texts = tokenize(load_encoder_tokenizer(system.encoder), dataset.titles, system.max_tokens)
    start_from_text(backbone, encode_texts(reader, texts, batch_size, device), whiten=system.whiten)


def build_recformer_pretrain(config: RunConfig, system: RecformerPretrainConfig, dataset: Dataset) -> AnySystem:
    """Build RECFORMER's pre-training."""
    writer = _sentence_writer(system, dataset)
    batches = PretrainBatches(writer, system.mask_share, config.seed)
    collator = SentenceCollator[SentencePairs](writer, batches)
    model = RecformerPretrain(system, _sentence_encoder(system))
    return vector_system(model, collator, costly_items=True, llm=encoder_fingerprint(system.encoder))


def build_recformer(config: RunConfig, system: RecformerConfig, dataset: Dataset, sources: Sources) -> AnySystem:
    """Build one of the two stages of RECFORMER's fine-tuning."""
    if system.negatives is not None:
        key = f"system.negatives={system.negatives}"
        check_negatives(dataset, key=key, needed=system.negatives, seen=None)
    writer = _sentence_writer(system, dataset)
    batches = FinetuneBatches(writer, dataset.num_items, system.negatives, config.seed)
    collator = SentenceCollator[SentenceTraining](writer, batches)
    model = Recformer(system, _sentence_encoder(system), dataset.num_items)
    fingerprint = encoder_fingerprint(system.encoder)
    built_on: dict[str, str] = {}
    if pretrained := sources.recformer_pretrain:
        built_on["pretrained"] = _continue_from("pretrained", pretrained, model, fingerprint)
    if stage1 := sources.recformer_stage1:
        built_on["stage1"] = _continue_from("stage1", stage1, model, fingerprint)
        model.table.replace(weights_below("table.", stage1.checkpoint)["value"])
    epoch_items = EpochItems(collator.items, model.encode_items, model.keep_items) if system.stage == 1 else None
    return vector_system(model, collator, llm=fingerprint, built_on=built_on, epoch_items=epoch_items)


def _continue_from(key: str, run: SourceRun[SectionT], model: Recformer, fingerprint: str) -> str:
    """Load the sentence encoder of the run `system.<key>`; returns the sha256 of that run's weights."""
    check_same_encoder(key, run, fingerprint)
    # Not strict: checkpoints leave out weights that were frozen, such as word embeddings.
    model.sentence.load_state_dict(weights_below("sentence.", run.checkpoint), strict=False)
    return run.checkpoint.weights_sha256


def _sentence_writer(system: RecformerConfig | RecformerPretrainConfig, dataset: Dataset) -> SentenceWriter:
    check_encoder(system.encoder, system.max_tokens, "system.max_tokens")
    return recformer_writer(system, catalog_attributes(system, dataset))


def catalog_attributes(system: RecformerConfig | RecformerPretrainConfig, dataset: Dataset) -> list[dict[str, str]]:
    """The attributes of items 1 to N that RECFORMER reads, by name."""
    texts = dataset.texts(*system.attributes)
    return [{str(name): text for name, text in zip(system.attributes, values, strict=True)} for values in texts]


def recformer_writer(
    system: RecformerConfig | RecformerPretrainConfig, items: Sequence[Mapping[str, str]]
) -> SentenceWriter:
    """The writer of sentences for items with these attributes."""
    return sentence_writer(
        load_encoder_tokenizer(system.encoder),
        items,
        max_attribute_tokens=system.max_attribute_tokens,
        max_items=system.max_items,
        max_tokens=system.max_tokens,
    )


def _sentence_encoder(system: RecformerConfig | RecformerPretrainConfig) -> SentenceEncoder:
    encoder = load_encoder(system.encoder, dropout=system.dropout, attention_window=_LONGFORMER_WINDOW)
    if system.freeze_words:
        encoder.words().requires_grad_(False)
    return SentenceEncoder(encoder, system.max_items, system.pooling)
