"""Builders of the systems that read items as text."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from trainer.config import ConfigError, RunConfig
from trainer.config.needs import aligned_run, recformer_run, stage1_run
from trainer.config.runs import Checkpoint, CheckpointError
from trainer.config.text_systems import (
    ALLMRecStage1Config,
    CTRLAlignConfig,
    CTRLConfig,
    RecformerConfig,
    RecformerPretrainConfig,
)
from trainer.data.batches import Rows, to_device
from trainer.data.catalog import Dataset
from trainer.data.sentences import SentenceWriter, write_sentences
from trainer.data.text_batches import (
    FinetuneBatches,
    HistoryTextCollator,
    ItemPairCollator,
    PretrainBatches,
    SentenceCollator,
)
from trainer.data.texts import TokenLists, tokenize, write_histories
from trainer.models.a_llmrec_stage1 import ALLMRecStage1, AutoEncoder
from trainer.models.build_ids import build_sasrec, load_teacher, sequence_collator
from trainer.models.ctrl import CTRLAlign, TextItems, start_from_text
from trainer.models.recformer import Recformer, RecformerPretrain, SentenceEncoder
from trainer.models.sasrec import SASRec
from trainer.models.system import EpochItems, System, check_negatives
from trainer.nn.carried import CarriedTable
from trainer.nn.text_encoder import (
    TextVectors,
    check_encoder,
    encoder_fingerprint,
    encoder_width,
    load_encoder,
    load_encoder_tokenizer,
)

_LONGFORMER_WINDOW = 64  # tokens; RECFORMER's own


def build_ctrl(config: RunConfig, system: CTRLConfig, dataset: Dataset) -> System:
    """A SASRec whose items start from text, or from an alignment run."""
    inner, backbone = _text_backbone(config, system, dataset)
    fingerprint = encoder_fingerprint(system.encoder)
    if system.aligned is None:
        initialize = partial(_start_backbone, backbone, system, dataset, config.evaluation.batch_size)
        return System(backbone, inner.collator, fingerprint, {}, initialize)
    checkpoint = aligned_run(system, system.aligned, dataset.path, dataset.manifest)
    _same_encoder("aligned", system.aligned, checkpoint, fingerprint)
    backbone.load_state_dict(_weights_below("backbone.", checkpoint))
    return System(backbone, inner.collator, fingerprint, {"aligned": checkpoint.weights_sha256})


def build_ctrl_align(config: RunConfig, system: CTRLAlignConfig, dataset: Dataset) -> System:
    """A SASRec whose items start from text, beside the frozen encoder."""
    _, backbone = _text_backbone(config, system, dataset)
    sequences = sequence_collator(system.backbone, dataset, config.seed)
    writer = write_histories(
        load_encoder_tokenizer(system.encoder),
        dataset.titles,
        max_tokens=system.max_tokens,
        max_history=system.max_history,
    )
    check_encoder(system.encoder, writer.longest, "system.max_history x system.max_tokens")
    model = CTRLAlign(system, backbone, TextVectors(load_encoder(system.encoder), system.pooling))
    initialize = partial(_start_backbone, backbone, system, dataset, config.evaluation.batch_size)
    collator = HistoryTextCollator(sequences, writer, config.seed)
    return System(model, collator, encoder_fingerprint(system.encoder), {}, initialize)


def build_recformer_pretrain(config: RunConfig, system: RecformerPretrainConfig, dataset: Dataset) -> System:
    """RECFORMER's encoder, before it knows the task."""
    writer = _sentence_writer(system, dataset)
    collator = SentenceCollator(writer, PretrainBatches(writer, system.mask_share, config.seed))
    model = RecformerPretrain(system, _sentence_encoder(system))
    return System(model, collator, encoder_fingerprint(system.encoder))


def build_recformer(config: RunConfig, system: RecformerConfig, dataset: Dataset) -> System:
    """One stage of RECFORMER's fine-tuning."""
    if system.negatives is not None:
        key = f"system.negatives={system.negatives}"
        check_negatives(dataset, key=key, needed=system.negatives, seen=None)
    writer = _sentence_writer(system, dataset)
    collator = SentenceCollator(writer, FinetuneBatches(writer, dataset.num_items, system.negatives, config.seed))
    model = Recformer(system, _sentence_encoder(system), dataset.num_items)
    fingerprint = encoder_fingerprint(system.encoder)
    built_on = {}
    for key, path in (("pretrained", system.pretrained), ("stage1", system.stage1)):
        if path is not None:
            checkpoint = recformer_run(system, key, path, dataset.path, dataset.manifest)
            _same_encoder(key, path, checkpoint, fingerprint)
            model.sentence.load_state_dict(_weights_below("sentence.", checkpoint), strict=False)
            built_on[key] = checkpoint.weights_sha256
            if key == "stage1":
                model.table.keep(_weights_below("table.", checkpoint)["value"])
    epoch_items = EpochItems(model.encode_items, model.table.keep) if system.stage == 1 else None
    return System(model, collator, fingerprint, built_on, epoch_items=epoch_items)


def build_a_llmrec_stage1(config: RunConfig, system: ALLMRecStage1Config, dataset: Dataset) -> System:
    """Stage 1 of A-LLMRec over a frozen SASRec."""
    check_negatives(dataset, key="A-LLMRec's stage 1", needed=1, seen=None)
    teacher, teacher_sha256 = load_teacher(system.teacher, dataset)
    check_encoder(system.encoder, system.max_tokens, "system.max_tokens")
    tokenizer = load_encoder_tokenizer(system.encoder)
    written = dataset.texts("title", "description")
    texts = tokenize(tokenizer, [f'"{", ".join(filter(None, parts))}"' for parts in written], system.max_tokens)
    reader = TextVectors(load_encoder(system.encoder, dropout=system.dropout), system.pooling)
    model = ALLMRecStage1(system, teacher, reader)
    initialize = None
    if not system.train_encoder:
        kept = CarriedTable(dataset.num_items + 1, reader.encoder.dim)
        model = ALLMRecStage1(system, teacher, kept)
        initialize = partial(_keep_text_vectors, kept, reader, texts, config.evaluation.batch_size)
    collator = ItemPairCollator(
        sequence_collator(teacher.config, dataset, config.seed), texts, dataset.num_items, config.seed
    )
    fingerprint = encoder_fingerprint(system.encoder)
    return System(model, collator, fingerprint, {"teacher": teacher_sha256}, initialize)


def load_stage1(path: Path, dataset: Dataset, teacher_sha256: str) -> tuple[nn.Module, str]:
    """What stage 2 of A-LLMRec needs of stage 1: the frozen item encoder, and the sha256 of the run's weights.

    Args:
        teacher_sha256: of the teacher whose item vectors will be encoded (see `load_teacher`).

    Returns:
        A module from rows of the teacher's item table (M, D) to latent vectors (M, latent_dim).

    Raises:
        ValueError: no such run, damaged, of another catalog, or trained over another teacher.
    """
    system, checkpoint = stage1_run(path, dataset.path, dataset.manifest)
    if checkpoint.identity.built_on.get("teacher") != teacher_sha256:
        raise CheckpointError(
            f"the stage1 {path} was trained over another teacher than system.teacher: "
            f"set system.teacher={system.teacher}, or train stage 1 over yours"
        )
    weights = _weights_below("item_coder.", checkpoint)
    coder = AutoEncoder(weights["decode.weight"].shape[0], system.latent_dim)
    coder.load_state_dict(weights)
    return coder.encode.requires_grad_(False), checkpoint.weights_sha256


def _keep_text_vectors(
    table: CarriedTable, reader: TextVectors, texts: TokenLists, batch_size: int, device: torch.device
) -> None:
    """Fill rows 1 to N of the table, and leave 0, which is padding."""
    vector_NW = encode_texts(reader, texts, batch_size, device)
    table.to(device).keep(torch.cat([torch.zeros_like(vector_NW[:1]), vector_NW]))


@torch.no_grad()
def encode_texts(reader: TextVectors, texts: TokenLists, batch_size: int, device: torch.device) -> Tensor:
    """(N, W) vectors of all texts; those of similar length are read together."""
    reader.to(device).eval()
    order = texts.length_N.argsort(kind="stable")
    batches = [order[first : first + batch_size] for first in range(0, len(order), batch_size)]
    parts = [reader(to_device(texts.padded(batch, Rows(0, len(batch), len(batch))), device)) for batch in batches]
    vector_NW = torch.empty(len(order), reader.encoder.dim, device=device)
    vector_NW[torch.from_numpy(order).to(device)] = torch.cat(parts)
    return vector_NW


def _text_backbone(config: RunConfig, system: CTRLConfig | CTRLAlignConfig, dataset: Dataset) -> tuple[System, SASRec]:
    """CTRL's SASRec as its own builder makes it, and the same with the items that the adapter asks for."""
    check_encoder(system.encoder, system.max_tokens, "system.max_tokens")
    width, dim = encoder_width(system.encoder), system.backbone.dim
    if dim > width or dim >= dataset.num_items:
        limit = min(width, dataset.num_items - 1)
        raise ConfigError(
            f"system.backbone.dim={dim}, but the text vectors of {dataset.num_items} items with {width} dimensions "
            f"have at most {limit} components: set it to {limit} or less"
        )
    inner = build_sasrec(config, system.backbone, dataset)
    backbone = inner.model
    assert isinstance(backbone, SASRec)
    if system.adapter == "linear":
        backbone.add_module("items", TextItems(dataset.num_items + 1, width, dim))
    return inner, backbone


def _start_backbone(
    backbone: SASRec,
    system: CTRLConfig | CTRLAlignConfig,
    dataset: Dataset,
    batch_size: int,
    device: torch.device,
) -> None:
    reader = TextVectors(load_encoder(system.encoder), system.pooling)
    texts = tokenize(load_encoder_tokenizer(system.encoder), dataset.titles, system.max_tokens)
    start_from_text(backbone, encode_texts(reader, texts, batch_size, device), whiten=system.whiten)


def _sentence_writer(system: RecformerConfig | RecformerPretrainConfig, dataset: Dataset) -> SentenceWriter:
    check_encoder(system.encoder, system.max_tokens, "system.max_tokens")
    texts = dataset.texts(*system.attributes)
    return write_sentences(
        load_encoder_tokenizer(system.encoder),
        [dict(zip(system.attributes, values, strict=True)) for values in texts],
        max_attribute_tokens=system.max_attribute_tokens,
        max_items=system.max_items,
        max_tokens=system.max_tokens,
    )


def _sentence_encoder(system: RecformerConfig | RecformerPretrainConfig) -> SentenceEncoder:
    encoder = load_encoder(system.encoder, dropout=system.dropout, attention_window=_LONGFORMER_WINDOW)
    if system.freeze_words:
        encoder.words().requires_grad_(False)
    return SentenceEncoder(encoder, system.max_items)


def _same_encoder(key: str, path: Path, checkpoint: Checkpoint, fingerprint: str) -> None:
    if checkpoint.identity.llm != fingerprint:
        raise CheckpointError(
            f"system.{key}={path} was trained with another encoder than system.encoder: "
            f"set system.encoder as in {path / 'config.yaml'}"
        )


def _weights_below(prefix: str, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The weights of one part of a model, by their names within it."""
    saved = load_file(checkpoint.weights)
    return {name.removeprefix(prefix): tensor for name, tensor in saved.items() if name.startswith(prefix)}
