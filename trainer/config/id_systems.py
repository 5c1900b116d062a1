"""Configuration sections of the ID-based systems: SASRec, GRU4Rec, BERT4Rec and NextItNet."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from trainer.config.section import Count, Fraction, Section, Weight


class SASRecConfig(Section):
    """SASRec (Kang & McAuley 2018) as LLM-SRec uses it; sizes default to those of the official LLM-SRec code."""

    name: Literal["sasrec"]
    dim: Count = 64
    """Width of the item vectors."""
    max_length: Count = 128
    """Only the last `max_length` items of a user are read."""
    blocks: Count = 2
    """Number of Transformer blocks."""
    heads: Count = 1
    """Attention heads per block; they divide `dim`."""
    dropout: Fraction = 0.1
    """Dropout of the input item vectors and inside each block."""
    norm: Literal["original", "pre", "post"] = "original"
    """`original`: only queries are normalised, not keys and values (Kang). `pre`, `post`: standard Transformer."""
    mask_padding: bool = True
    """False lets attention see left padding, as the official PyTorch port does."""
    loss: Literal["bce", "sampled_softmax", "full_softmax", "gbce"] = "bce"
    """`bce`: binary cross-entropy against `negatives` (Kang). `sampled_softmax`, `full_softmax`: cross-entropy against
    `negatives`, or all items. `gbce`: gSASRec's calibrated binary cross-entropy (`gbce_t`)."""
    negatives: Count = 1
    """Uniform negatives per position (`full_softmax` uses none)."""
    gbce_t: Annotated[float, Field(ge=0.0, le=1.0)] = 0.75
    """Calibration of gBCE (gSASRec): 0 is plain BCE, 1 removes all over-confidence due to negative sampling."""

    @model_validator(mode="after")
    def _heads_divide_dim(self) -> Self:
        _check_heads(self.dim, self.heads)
        return self


class GRU4RecConfig(Section):
    """GRU4Rec (Hidasi et al. 2016; BPR-max: Hidasi & Karatzoglou 2018) over whole user sequences.

    Sizes default to those of RecBole, which also reads users instead of sessions; the official code has 1 layer of 100.
    """

    name: Literal["gru4rec"]
    dim: Count = 64
    """Width of the item vectors."""
    hidden: Count = 128
    """Width of the recurrent state; if it is not `dim`, a linear layer projects it back to `dim`."""
    layers: Count = 1
    """Number of GRU layers."""
    max_length: Count = 128
    """Only the last `max_length` items of a user are read."""
    dropout: Fraction = 0.3
    """Dropout of the input item vectors."""
    hidden_dropout: Fraction = 0.0
    """Dropout of the states of each layer."""
    loss: Literal["full_softmax", "sampled_softmax", "bpr_max"] = "full_softmax"
    """`full_softmax`, `sampled_softmax`: cross-entropy against all items, or `negatives`. `bpr_max`: the second paper's
    loss."""
    negatives: Count = 256
    """Distinct negatives per user, shared by all positions (`full_softmax` uses none)."""
    bpr_regularization: Weight = 1.0
    """Weight of BPR-max's score regularisation (official code: bpreg)."""
    bpr_elu: Annotated[float, Field(ge=0.0)] = 0.5
    """BPR-max compares ELU(score) with this alpha (official code: elu-0.5); 0 compares the scores themselves."""


class BERT4RecConfig(Section):
    """BERT4Rec (Sun et al. 2019): bidirectional attention, trained to fill in masked items."""

    name: Literal["bert4rec"]
    dim: Count = 64
    """Width of the item vectors."""
    max_length: Annotated[int, Field(ge=2)] = 128
    """Positions, including the final [MASK]."""
    blocks: Count = 2
    """Number of Transformer blocks."""
    heads: Count = 2
    """Attention heads per block; they divide `dim`."""
    dropout: Fraction = 0.2
    """Dropout of the input item vectors and inside each block."""
    mask_share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.2
    """Share of a sequence that is masked, at least one item (official code for MovieLens)."""
    last_item_share: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5
    """Share of training sequences in which only the last item is masked, as when ranking: they are cut after a random
    item, which is masked (RecBole: half of its batches; official code: one uncut copy beside ten others)."""

    @model_validator(mode="after")
    def _heads_divide_dim(self) -> Self:
        _check_heads(self.dim, self.heads)
        return self


class NextItNetConfig(Section):
    """NextItNet (Yuan et al. 2019): residual blocks of causal dilated convolutions."""

    name: Literal["nextitnet"]
    dim: Count = 64
    """Width of the item vectors."""
    max_length: Count = 128
    """Only the last `max_length` items of a user are read."""
    block: Literal["one_layer", "two_layer"] = "two_layer"
    """`one_layer`: Figure 3a of the paper, one dilated convolution between two 1x1 ones. `two_layer`: Figure 3b, two
    dilated convolutions, the second with twice the dilation."""
    kernel: Annotated[int, Field(ge=2)] = 3
    """Width of the convolutions, in items."""
    dilations: Annotated[tuple[Count, ...], Field(min_length=1)] = (1, 4, 1, 4, 1, 4)
    """Dilation of each block; their number is the number of blocks."""
    dropout: Fraction = 0.0
    """Dropout of the input item vectors and of the residual that each block adds (the paper uses none)."""

    @model_validator(mode="after")
    def _half_of_dim(self) -> Self:
        if self.block == "one_layer" and self.dim % 2:
            raise ValueError(f"dim={self.dim} is odd, but block=one_layer convolves in half the width: make dim even")
        return self


def _check_heads(dim: int, heads: int) -> None:
    if dim % heads:
        raise ValueError(f"dim={dim} is not a multiple of heads={heads}")
