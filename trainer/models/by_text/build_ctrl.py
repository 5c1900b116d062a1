"""Builders of CTRL and of its alignment."""

from __future__ import annotations

from functools import partial

import torch

from trainer.config import ConfigError, RunConfig
from trainer.config.text_systems import CTRLAlignConfig, CTRLConfig
from trainer.data.collators.item_texts import HistoryTextCollator
from trainer.data.encoder_texts import tokenize, write_histories
from trainer.data.reading.dataset import Dataset
from trainer.models.by_id.build import build_sasrec, sequence_collator
from trainer.models.by_id.sasrec import SASRec
from trainer.models.by_text.ctrl import CTRLAlign, TextItems, start_from_text
from trainer.models.by_text.encoding import check_same_encoder, encode_texts, weights_below
from trainer.models.system import System
from trainer.nn.text_encoder import (
    TextVectors,
    check_encoder,
    encoder_fingerprint,
    encoder_width,
    load_encoder,
    load_encoder_tokenizer,
)
from trainer.runs.requirements import aligned_run


def build_ctrl(config: RunConfig, system: CTRLConfig, dataset: Dataset) -> System:
    """A SASRec whose items start from text, or from an alignment run."""
    inner, backbone = _text_backbone(config, system, dataset)
    fingerprint = encoder_fingerprint(system.encoder)
    if system.aligned is None:
        initialize = partial(_start_backbone, backbone, system, dataset, config.evaluation.batch_size)
        return System(backbone, inner.collator, fingerprint, {}, initialize)
    checkpoint = aligned_run(system, system.aligned, dataset.path, dataset.manifest)
    check_same_encoder("aligned", system.aligned, checkpoint, fingerprint)
    backbone.load_state_dict(weights_below("backbone.", checkpoint))
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
