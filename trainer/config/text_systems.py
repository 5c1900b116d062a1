"""Systems that read items as text with an encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from trainer.config.id_systems import SASRecConfig
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


class CTRLConfig(Section):
    """CTRL as the LLM-SRec paper describes it: text vectors of the items start a SASRec, which is then trained."""

    name: Literal["ctrl"]
    encoder: EncoderConfig
    backbone: SASRecConfig = SASRecConfig(name="sasrec")
    pooling: Pooling = "mean"
    max_tokens: TokenLimit = 64
    """A title keeps at most this many tokens."""
    adapter: Literal["pca", "linear"] = "pca"
    """`pca`: the item table starts at the principal components of the text vectors and is trained. `linear`: the text
    vectors stay, and a linear layer on them, which starts at the same components, is trained instead of a table."""
    whiten: bool = True
    """Give all components the same deviation; False keeps those of the text vectors, where the first few dominate."""
    aligned: Path | None = None
    """Run folder of a `ctrl_align` run to start from instead of the text vectors themselves."""


class CTRLAlignConfig(Section):
    """The contrastive alignment of CTRL (Li et al. 2023, arXiv 2306.02841, §4.1): SASRec and a frozen encoder read the
    same history, as ids and as a sentence, and their vectors are drawn together."""

    name: Literal["ctrl_align"]
    encoder: EncoderConfig
    backbone: SASRecConfig = SASRecConfig(name="sasrec")
    pooling: Pooling = "mean"
    max_tokens: TokenLimit = 32
    """A title keeps at most this many tokens."""
    max_history: Count = 10
    """Items in a sentence, the latest ones."""
    adapter: Literal["pca", "linear"] = "pca"
    whiten: bool = True
    subspaces: Count = 3
    """Each vector is compared in this many projections (fine-grained alignment)."""
    temperature: Temperature = 0.07


Attribute = Literal["title", "brand", "category"]


class RecformerPretrainConfig(Section):
    """Pre-training of RECFORMER (Li et al., KDD 2023, §2.3): masked words and in-batch item contrast."""

    name: Literal["recformer_pretrain"]
    encoder: EncoderConfig
    attributes: Annotated[tuple[Attribute, ...], Field(min_length=1)] = ("title", "brand", "category")
    max_items: Count = 50
    max_tokens: TokenLimit = 1024
    """Longest sequence; what is oldest is cut."""
    max_attribute_tokens: Count = 32
    pooling: Pooling = "cls"
    """Which hidden state is a text's vector: that of the start token (paper), or the mean over all tokens, which needs
    no pre-training to tell texts apart."""
    dropout: Fraction = 0.1
    """Of embeddings and hidden states; the attention has none, so that masks do not depend on the ranks."""
    freeze_words: bool = True
    """Word embeddings stay as they are (official code)."""
    temperature: Temperature = 0.05
    mask_share: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.15
    mlm_weight: Weight = 0.1
    """Of each of the two masked-word losses, of histories and of target items."""


class RecformerConfig(Section):
    """Fine-tuning of RECFORMER (§2.4), one run a stage."""

    name: Literal["recformer"]
    encoder: EncoderConfig
    stage: Literal[1, 2] = 1
    """1: item vectors are computed anew at the start of each epoch and stay fixed within it. 2: they stay those of
    the best checkpoint of stage 1."""
    pretrained: Path | None = None
    """Stage 1: run folder of the `recformer_pretrain` run to start from; without it, the encoder as it is."""
    stage1: Path | None = None
    """Stage 2: run folder of stage 1."""
    attributes: Annotated[tuple[Attribute, ...], Field(min_length=1)] = ("title", "brand", "category")
    max_items: Count = 50
    max_tokens: TokenLimit = 1024
    max_attribute_tokens: Count = 32
    pooling: Pooling = "cls"
    """As in pre-training."""
    dropout: Fraction = 0.1
    freeze_words: bool = False
    temperature: Temperature = 0.05
    negatives: Count | None = None
    """Sampled items that the target is told from; None: all items."""

    @model_validator(mode="after")
    def _each_stage_starts_somewhere(self) -> Self:
        if self.stage == 2 and self.stage1 is None:
            raise ValueError("stage 2 starts from stage 1: set system.stage1 to the folder of that run")
        if self.stage == 2 and self.pretrained is not None:
            raise ValueError("stage 2 starts from stage 1 alone: leave out system.pretrained")
        if self.stage == 1 and self.stage1 is not None:
            raise ValueError("system.stage1 is for stage 2: set system.stage=2, or leave it out")
        return self
