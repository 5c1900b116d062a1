"""Configuration sections of the systems with a text encoder: A-LLMRec's stage 1, CTRL and RECFORMER."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from trainer.config.id_systems import SASRecConfig
from trainer.config.section import Count, Fraction, PathText, Section, Weight

Pooling = Literal["mean", "cls"]
Temperature = Annotated[float, Field(gt=0.0)]
TokenLimit = Annotated[int, Field(ge=8)]


class EncoderConfig(Section):
    """A pre-trained text encoder."""

    path: PathText
    """Folder (or hub id) of an encoder in Hugging Face format: config, safetensors, tokenizer."""
    layers: Count | None = None
    """Run only the first k layers, for small machines. None: all layers."""


class ALLMRecStage1Config(Section):
    """Stage 1 of A-LLMRec (KDD'24, §3.1): aligns item and text vectors in one latent space. Defaults: official code."""

    name: Literal["a_llmrec_stage1"]
    encoder: EncoderConfig
    teacher: Path
    """Run folder of the trained SASRec whose item vectors are aligned."""
    pooling: Pooling = "mean"
    """Vector of a text: the mean over its tokens, or the hidden state of the start token (`cls`)."""
    max_tokens: TokenLimit = 128
    """An item's text, title and description, is truncated to this many tokens."""
    latent_dim: Count = 128
    """Width of the shared latent space."""
    train_encoder: bool = True
    """False encodes each text once and keeps its vector: much faster, at the price of not tuning the encoder."""
    dropout: Fraction = 0.1
    """Dropout of the encoder in training; its attention has none, so that masks do not depend on the ranks."""
    matching_weight: Weight = 1.0
    """Weight of the loss that matches item and text vectors."""
    item_weight: Weight = 0.5
    """Weight of the item vectors' reconstruction loss."""
    text_weight: Weight = 0.2
    """Weight of the text vectors' reconstruction loss."""


class CTRLConfig(Section):
    """CTRL as the LLM-SRec paper describes it: a SASRec initialised from the items' text vectors, then trained."""

    name: Literal["ctrl"]
    encoder: EncoderConfig
    backbone: SASRecConfig = SASRecConfig(name="sasrec")
    pooling: Pooling = "mean"
    """Vector of a title: the mean over its tokens, or the hidden state of the start token (`cls`)."""
    max_tokens: TokenLimit = 64
    """Titles are truncated to this many tokens."""
    adapter: Literal["pca", "linear"] = "pca"
    """`pca`: the item table is initialised with the principal components of the text vectors and trained. `linear`: the
    text vectors are frozen, and a linear layer on them, initialised with the same components, is trained instead."""
    whiten: bool = True
    """Scale all components to the same standard deviation. False keeps their own, where the first few dominate."""
    aligned: Path | None = None
    """Run folder of a `ctrl_align` run to start from instead of the text vectors."""


class CTRLAlignConfig(Section):
    """Contrastive alignment of CTRL (Li et al. 2023, arXiv 2306.02841, §4.1): SASRec reads a history as ids, a frozen
    encoder reads it as a sentence, and their vectors are pulled together."""

    name: Literal["ctrl_align"]
    encoder: EncoderConfig
    backbone: SASRecConfig = SASRecConfig(name="sasrec")
    pooling: Pooling = "mean"
    """Vector of a title: the mean over its tokens, or the hidden state of the start token (`cls`)."""
    max_tokens: TokenLimit = 32
    """Titles are truncated to this many tokens."""
    max_history: Count = 10
    """Number of latest items in a sentence."""
    adapter: Literal["pca", "linear"] = "pca"
    """As in `CTRLConfig`."""
    whiten: bool = True
    """As in `CTRLConfig`."""
    subspaces: Count = 3
    """Number of projections in which vectors are compared (the paper's fine-grained alignment)."""
    temperature: Temperature = 0.07
    """Temperature of the contrastive loss."""


Attribute = Literal["title", "brand", "category"]


class RecformerPretrainConfig(Section):
    """Pre-training of RECFORMER (Li et al., KDD 2023, §2.3): masked language modelling and in-batch item contrast."""

    name: Literal["recformer_pretrain"]
    encoder: EncoderConfig
    attributes: Annotated[tuple[Attribute, ...], Field(min_length=1)] = ("title", "brand", "category")
    """Attributes of an item that its sentence names, in this order."""
    max_items: Count = 50
    """Number of latest items in a sequence."""
    max_tokens: TokenLimit = 1024
    """Longest sequence in tokens; the oldest items are truncated."""
    max_attribute_tokens: Count = 32
    """An attribute's value is truncated to this many tokens."""
    pooling: Pooling = "cls"
    """`cls`: the hidden state of the start token is the text's vector (paper). `mean`: the mean over all tokens, which
    tells texts apart even without pre-training."""
    dropout: Fraction = 0.1
    """Dropout of embeddings and hidden states; attention has none, so that masks do not depend on the ranks."""
    freeze_words: bool = True
    """Freeze the word embeddings (official code)."""
    temperature: Temperature = 0.05
    """Temperature of the contrastive loss between histories and next items."""
    mask_share: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.15
    """Share of tokens that are masked."""
    mlm_weight: Weight = 0.1
    """Weight of each of the two masked-word losses: on histories and on target items."""


class RecformerConfig(Section):
    """Fine-tuning of RECFORMER (§2.4), one run per stage."""

    name: Literal["recformer"]
    encoder: EncoderConfig
    stage: Literal[1, 2] = 1
    """1: item vectors are recomputed at the start of each epoch and fixed within it. 2: they stay those of the best
    checkpoint of stage 1."""
    pretrained: Path | None = None
    """Stage 1: run folder of the `recformer_pretrain` run to start from. None: the encoder as is."""
    stage1: Path | None = None
    """Stage 2: run folder of the finished stage 1."""
    attributes: Annotated[tuple[Attribute, ...], Field(min_length=1)] = ("title", "brand", "category")
    """Attributes of an item that its sentence names, in this order."""
    max_items: Count = 50
    """Number of latest items in a sequence; must equal the setting of the run that this one builds on."""
    max_tokens: TokenLimit = 1024
    """Longest sequence in tokens; the oldest items are truncated."""
    max_attribute_tokens: Count = 32
    """An attribute's value is truncated to this many tokens."""
    pooling: Pooling = "cls"
    """As in `RecformerPretrainConfig`; must equal the setting of the run that this one builds on."""
    dropout: Fraction = 0.1
    """Dropout of embeddings and hidden states; attention has none, so that masks do not depend on the ranks."""
    freeze_words: bool = False
    """Freeze the word embeddings."""
    temperature: Temperature = 0.05
    """Temperature of the softmax over items."""
    negatives: Count | None = None
    """Sampled negatives per target. None: softmax over all items."""

    @model_validator(mode="after")
    def _each_stage_starts_somewhere(self) -> Self:
        if self.stage == 2 and self.stage1 is None:
            raise ValueError("stage 2 starts from stage 1: set system.stage1 to the folder of that run")
        if self.stage == 2 and self.pretrained is not None:
            raise ValueError("stage 2 starts from stage 1 alone: leave out system.pretrained")
        if self.stage == 1 and self.stage1 is not None:
            raise ValueError("system.stage1 is for stage 2: set system.stage=2, or leave it out")
        return self
