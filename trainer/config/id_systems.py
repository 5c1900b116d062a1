"""Systems that know items by number."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from trainer.config.section import Count, Fraction, Section, Weight


class SASRecConfig(Section):
    """SASRec (Kang & McAuley 2018) as LLM-SRec uses it; the sizes are those of the official LLM-SRec code."""

    name: Literal["sasrec"]
    dim: Count = 64
    max_length: Count = 128
    """Only the last `max_length` items of a user are read."""
    blocks: Count = 2
    heads: Count = 1
    dropout: Fraction = 0.1
    norm: Literal["original", "pre", "post"] = "original"
    """`original`: queries normalised, keys and values not (Kang); `pre` and `post`: standard Transformer blocks."""
    mask_padding: bool = True
    """False lets attention see left padding, as the official PyTorch copy does."""
    loss: Literal["bce", "sampled_softmax", "full_softmax", "gbce"] = "bce"
    negatives: Count = 1
    """Uniform negatives a position (`full_softmax` needs none)."""
    gbce_t: Annotated[float, Field(ge=0.0, le=1.0)] = 0.75

    @model_validator(mode="after")
    def _heads_divide_dim(self) -> Self:
        _check_heads(self.dim, self.heads)
        return self


class GRU4RecConfig(Section):
    """GRU4Rec (Hidasi et al. 2016; BPR-max: Hidasi & Karatzoglou 2018) over whole user sequences.

    Sizes are those of RecBole, which also reads users instead of sessions; the official code starts from 1 x 100.
    """

    name: Literal["gru4rec"]
    dim: Count = 64
    hidden: Count = 128
    """Width of the recurrent state; unless it is `dim`, a linear layer leads back to the items."""
    layers: Count = 1
    max_length: Count = 128
    """Only the last `max_length` items of a user are read."""
    dropout: Fraction = 0.3
    """Of item vectors where they enter."""
    hidden_dropout: Fraction = 0.0
    """Of the states of each layer."""
    loss: Literal["full_softmax", "sampled_softmax", "bpr_max"] = "full_softmax"
    negatives: Count = 256
    """Different negatives a user, shared by all positions (`full_softmax` needs none)."""
    bpr_regularization: Weight = 1.0
    """Weight of BPR-max's score regularisation (official code: bpreg)."""
    bpr_elu: Annotated[float, Field(ge=0.0)] = 0.5
    """BPR-max compares ELU(score) with this alpha (official code: elu-0.5); 0 compares the scores themselves."""


class BERT4RecConfig(Section):
    """BERT4Rec (Sun et al. 2019): bidirectional attention, trained to fill in masked items."""

    name: Literal["bert4rec"]
    dim: Count = 64
    max_length: Annotated[int, Field(ge=2)] = 128
    """Positions, that of the final [MASK] included."""
    blocks: Count = 2
    heads: Count = 2
    dropout: Fraction = 0.2
    mask_share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.2
    """Share of a sequence that is masked, at least one item (official code for MovieLens)."""
    last_item_share: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5
    """Share of training sequences that end in the one mask, as they will when ranking: cut after a random item, which
    is masked (RecBole, for half of its batches; the official code adds one uncut copy to ten others)."""

    @model_validator(mode="after")
    def _heads_divide_dim(self) -> Self:
        _check_heads(self.dim, self.heads)
        return self


class NextItNetConfig(Section):
    """NextItNet (Yuan et al. 2019): residual blocks of causal dilated convolutions."""

    name: Literal["nextitnet"]
    dim: Count = 64
    max_length: Count = 128
    """Only the last `max_length` items of a user are read."""
    block: Literal["one_layer", "two_layer"] = "two_layer"
    """The paper's Figure 3a (one dilated convolution between two 1x1) or 3b (two, the second twice as dilated)."""
    kernel: Annotated[int, Field(ge=2)] = 3
    dilations: Annotated[tuple[Count, ...], Field(min_length=1)] = (1, 4, 1, 4, 1, 4)
    """One block each."""
    dropout: Fraction = 0.0
    """Of item vectors where they enter, and of what each block adds (the paper has none)."""

    @model_validator(mode="after")
    def _half_of_dim(self) -> Self:
        if self.block == "one_layer" and self.dim % 2:
            raise ValueError(f"dim={self.dim} is odd, but block=one_layer convolves in half the width: make dim even")
        return self


def _check_heads(dim: int, heads: int) -> None:
    if dim % heads:
        raise ValueError(f"dim={dim} is not a multiple of heads={heads}")
