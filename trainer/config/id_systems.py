"""Systems that know items by number."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from trainer.config.section import Count, Fraction, Section


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
        if self.dim % self.heads:
            raise ValueError(f"dim={self.dim} is not a multiple of heads={self.heads}")
        return self
