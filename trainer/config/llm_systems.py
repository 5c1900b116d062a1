"""Systems around a large language model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from trainer.config.section import Count, Section, Weight


class LLMConfig(Section):
    """The frozen language model."""

    path: str
    """Folder (or hub id) of a causal LM in Hugging Face layout: config, safetensors, tokenizer."""
    layers: Count | None = None
    """Run only the first k decoder layers (small machines). None: all of them."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    quantization: Literal["none", "int8"] = "none"
    """`int8`: LLM.int8() of bitsandbytes (Dettmers et al. 2022), as the official code loads the LLM."""
    max_tokens: Annotated[int, Field(ge=64)] = 1024
    """Longest prompt."""
    packing: Literal["stream", "rows"] = "stream"
    """`stream`: all prompts of a batch end to end, what they share computed once, no padding. `rows`: whole prompts in
    padded rows of `max_tokens`, the same shapes at every step, for compilers that need them (Gaudi)."""
    max_title_tokens: Annotated[int, Field(ge=4)] = 64
    """A title keeps at most this many tokens, quotes included."""


class LLMSRecConfig(Section):
    """LLM-SRec (KDD'25). Defaults follow the official code wherever the paper is silent."""

    name: Literal["llm_srec"]
    llm: LLMConfig
    teacher: Path
    """Run folder of the trained SASRec that is distilled and whose item table is injected."""
    prompt: Literal["code", "paper"] = "code"
    """Wording of the item lines: the official code's, or that of the paper's Table 2."""
    max_history: Count = 10
    """Items shown in the user prompt, the latest ones (official code; the paper is silent)."""
    projected_dim: Count = 128
    hidden_dim: Count = 2048
    readout_init: Literal["xavier", "standardized"] = "xavier"
    """How f_user and f_item start: as in the official code, or on hidden states standardized over a sample of users
    and items. Read-outs of different users start with a cosine above 0.99, and the second form starts them apart."""
    train_candidates: Annotated[int, Field(ge=2)] = 4
    """Target plus sampled negatives in Equation 1 (official code; the paper does not say)."""
    negative_policy: Literal["exclude_user", "official"] = "exclude_user"
    """`official` excludes only the shown history, so that the target itself can be drawn as its negative."""
    distillation: Literal["mse", "contrastive"] = "mse"
    """Equation 2, or the contrastive form of Appendix E.2 (Equation 10)."""
    distill_normalize: bool = True
    """L2-normalise both vectors before distillation and uniformity (code and the paper's prose; not Eq. 2-3)."""
    mse_reduction: Literal["mean", "sum"] = "mean"
    distill_weight: Weight = 1.0
    uniformity_weight: Weight = 1.0
    contrastive_temperature: Annotated[float, Field(gt=0.0)] = 0.07
    contrastive_symmetric: bool = False
    teacher_dropout: bool = False
    """True keeps the teacher's dropout on while it is distilled, as the official code does by accident."""
