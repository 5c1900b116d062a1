"""Systems that read items as text with an encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from trainer.config.section import Count, Fraction, Section, Weight

Pooling = Literal["mean", "cls"]
Temperature = Annotated[float, Field(gt=0.0)]
TokenLimit = Annotated[int, Field(ge=8)]


class EncoderConfig(Section):
    """A text encoder."""

    path: str
    """Folder (or hub id) of an encoder in Hugging Face layout: config, safetensors, tokenizer."""
    layers: Count | None = None
    """Run only the first k layers (small machines). None: all of them."""


class ALLMRecStage1Config(Section):
    """Stage 1 of A-LLMRec (KDD'24, §3.1): item and text vectors meet in one latent space. Defaults: official code."""

    name: Literal["a_llmrec_stage1"]
    encoder: EncoderConfig
    teacher: Path
    """Run folder of the trained SASRec whose item table is read."""
    pooling: Pooling = "mean"
    max_tokens: TokenLimit = 128
    """A text, title and description, keeps at most this many tokens."""
    latent_dim: Count = 128
    train_encoder: bool = True
    """False reads each text once and keeps its vector: much faster, and what is lost is small-data tuning."""
    dropout: Fraction = 0.1
    """Of the encoder while it is trained; its attention has none, so that masks do not depend on the ranks."""
    matching_weight: Weight = 1.0
    item_weight: Weight = 0.5
    """Of the reconstruction of item vectors."""
    text_weight: Weight = 0.2
    """Of the reconstruction of text vectors."""
