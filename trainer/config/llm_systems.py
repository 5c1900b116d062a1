"""Systems around a large language model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from trainer.config.section import Count, Fraction, Section, Weight


class LLMConfig(Section):
    """The frozen language model."""

    path: str
    """Folder (or hub id) of a causal LM in Hugging Face layout: config, safetensors, tokenizer."""
    layers: Count | None = None
    """Run only the first k decoder layers (small machines). None: all of them."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    quantization: Literal["none", "int8", "fp8"] = "none"
    """`int8`: LLM.int8() of bitsandbytes (Dettmers et al. 2022), as the official code loads the LLM. `fp8`: linear
    layers in e4m3, for speed on Ada and Hopper GPUs; inexact (`trainer/nn/llm/fp8.py`)."""
    kernels: Literal["none", "liger"] = "none"
    """`liger`: fused kernels of Liger (CUDA) for norms, gated products and rotary positions."""
    recompute: bool = False
    """Forget activations and compute them again for the backward pass: less memory for a third more time."""
    max_tokens: Annotated[int, Field(ge=64)] = 1024
    """Longest prompt."""
    packing: Literal["stream", "rows"] = "stream"
    """`stream`: all prompts of a batch end to end, what they share computed once, no padding. `rows`: whole prompts in
    padded rows of `max_tokens`, of which there are only a few numbers, for devices that compile graphs (Gaudi)."""
    title_store: str | None = None
    """Folder with the keys and values of all titles, computed by `launchers/title_store.py`: steps and evaluation then
    run only what follows the title of an item prompt. None: titles are run in every step."""
    max_title_tokens: Annotated[int, Field(ge=4)] = 64
    """A title keeps at most this many tokens, quotes included."""


class LoRAConfig(Section):
    """Low-rank adapters inside the LLM. Defaults are those of the official TALLRec and CoLLM code."""

    rank: Count = 8
    alpha: Count = 16
    """Adapters are scaled by alpha / rank."""
    dropout: Fraction = 0.05
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = ("q_proj", "v_proj")
    """Names of the linear layers that get an adapter."""


class LLaRALoRAConfig(LoRAConfig):
    """The values of the official LLaRA code."""

    alpha: Count = 32
    dropout: Fraction = 0.1
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    )  # fmt: skip


class LLM4RecConfig(Section):
    """What all recommenders around an LLM share. Defaults follow LLM-SRec's official code where papers are silent."""

    llm: LLMConfig
    prompt: Literal["code", "paper"] = "code"
    """Wording of the item lines: that of LLM-SRec's official code, or of the paper's Tables 1 and 2."""
    max_history: Count = 10
    """Items shown in the user prompt, the latest ones (official code; the paper is silent)."""
    targets: Literal["last", "window", "all"] = "last"
    """What a step learns of each user (retrieval): the last training item (official code); all items of one stretch of
    `max_history` + 1, another one each epoch; or every item but the first (Appendix E.3)."""
    projected_dim: Count = 128
    hidden_dim: Count = 2048
    readout_init: Literal["xavier", "standardized"] = "xavier"
    """How f_user and f_item start: as in the official code, or on hidden states standardized over a sample of users
    and items. Read-outs of different users start with a cosine above 0.99, and the second form starts them apart."""
    train_candidates: Annotated[int, Field(ge=2)] = 4
    """Target plus sampled negatives in Equation 1 (official code; the paper does not say). The generation task lists
    as many candidates in training as the dataset stores for evaluation."""
    negative_policy: Literal["exclude_user", "official"] = "exclude_user"
    """`official` excludes only the shown history, so that the target itself can be drawn as its negative."""


class TALLRecConfig(LLM4RecConfig):
    """TALLRec (Bao et al., RecSys 2023) as the paper adapts it: titles alone, LoRA."""

    name: Literal["tallrec"]
    lora: LoRAConfig = LoRAConfig()


class LLaRAConfig(LLM4RecConfig):
    """LLaRA (Liao et al., SIGIR 2024) as the paper adapts it: the vector of each item behind its title, LoRA."""

    name: Literal["llara"]
    teacher: Path
    """Run folder of the trained SASRec whose item table is injected."""
    curriculum_steps: Count | None = None
    """Step s of these trains on titles alone, the projector untouched, with probability 1 - s / curriculum_steps, else
    on titles and vectors (official code: all steps of the run). None: titles and vectors always, as in the paper."""
    lora: LLaRALoRAConfig = LLaRALoRAConfig()


class CoLLMConfig(LLM4RecConfig):
    """CoLLM (Zhang et al. 2023) as the paper adapts it: the user's vector and those of the items, LoRA."""

    name: Literal["collm"]
    teacher: Path
    """Run folder of the trained SASRec whose user vectors and item table are injected."""
    projectors: Literal["separate", "shared"] = "separate"
    """f_U and f_I of the paper, or the one MLP of CoLLM's official code for both: Linear to 10 times the teacher's
    width, ReLU, Linear."""
    lora: LoRAConfig = LoRAConfig()


class ALLMRecConfig(LLM4RecConfig):
    """A-LLMRec (Kim et al., KDD 2024), stage 2: as CoLLM, but items go through the stage-1 encoder, and no LoRA."""

    name: Literal["a_llmrec"]
    teacher: Path
    """Run folder of the trained SASRec that stage 1 was trained on."""
    stage1: Path
    """Run folder of the trained `a_llmrec_stage1`."""


class LLMSRecConfig(LLM4RecConfig):
    """LLM-SRec (KDD'25). Defaults follow the official code wherever the paper is silent."""

    name: Literal["llm_srec"]
    teacher: Path
    """Run folder of the trained SASRec that is distilled and whose item table is injected."""
    user_vector: bool = False
    """Also put the teacher's user vector at the head of the user prompt (Table 11; CoLLM's prompt)."""
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
