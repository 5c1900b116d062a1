"""Builder of A-LLMRec's first stage, and what the second one takes from it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import nn

from trainer.config import RunConfig
from trainer.config.text_systems import ALLMRecStage1Config
from trainer.data.collators.item_texts import ItemPairCollator
from trainer.data.encoder_texts import TokenLists, tokenize
from trainer.data.reading.dataset import Dataset
from trainer.models.by_id.build import load_teacher, sequence_collator
from trainer.models.by_text.a_llmrec_stage1 import ALLMRecStage1, AutoEncoder
from trainer.models.by_text.encoding import encode_texts, weights_below
from trainer.models.system import System, check_negatives
from trainer.nn.saved_buffers import CarriedTable
from trainer.nn.text_encoder import (
    TextVectors,
    check_encoder,
    encoder_fingerprint,
    load_encoder,
    load_encoder_tokenizer,
)
from trainer.runs.folder import CheckpointError
from trainer.runs.requirements import stage1_run


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
    weights = weights_below("item_coder.", checkpoint)
    coder = AutoEncoder(weights["decode.weight"].shape[0], system.latent_dim)
    coder.load_state_dict(weights)
    return coder.encode.requires_grad_(False), checkpoint.weights_sha256


def _keep_text_vectors(
    table: CarriedTable, reader: TextVectors, texts: TokenLists, batch_size: int, device: torch.device
) -> None:
    """Fill rows 1 to N of the table, and leave 0, which is padding."""
    vector_NW = encode_texts(reader, texts, batch_size, device)
    table.to(device).keep(torch.cat([torch.zeros_like(vector_NW[:1]), vector_NW]))
