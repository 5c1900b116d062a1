"""Configuration sections of the LLM recommenders: TALLRec, LLaRA, CoLLM, A-LLMRec and LLM-SRec."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from trainer.config.section import Count, Fraction, PathText, Section, Weight


class LLMConfig(Section):
    """The frozen language model."""

    path: PathText
    """Folder (or hub id) of a causal LM in Hugging Face format: config, safetensors, tokenizer."""
    layers: Count | None = None
    """Run only the first k decoder layers, for small machines. None: all layers."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """dtype of the frozen LLM; trained parameters are always fp32."""
    quantization: Literal["none", "int8", "fp8"] = "none"
    """Both are lossy. `int8`: the weights of linear layers in int8, with one scale per output channel, for memory
    (`trainer/nn/llm/int8.py`); not LLM.int8(), with which the official code loads the LLM. `fp8`: linear layers in
    e4m3, on Ada and Hopper GPUs (`trainer/nn/llm/fp8.py`): the same memory, less exact, and by estimate about a tenth
    faster than bf16 where the device, not the host, is the limit."""
    kernels: Literal["none", "liger"] = "none"
    """`liger`: Liger's fused CUDA kernels for norms, gated activations and rotary embeddings."""
    recompute: bool = False
    """Activation checkpointing: recompute activations in the backward pass. Saves memory, takes a third more time."""
    max_tokens: Annotated[int, Field(ge=64)] = 1024
    """Longest prompt, in tokens."""
    packing: Literal["stream", "rows"] = "stream"
    """`stream`: all prompts of a batch end to end without padding, shared prefixes computed once. `rows`: whole prompts
    in padded rows of `max_tokens`, with only a few different row counts, for devices that compile graphs (Gaudi)."""
    title_store: PathText | None = None
    """Folder of a prefix cache: the KV cache of all titles, computed by `launchers/title_store.py`. Training steps and
    evaluation then run only what follows the title in an item prompt. None: titles are run in every step."""
    max_title_tokens: Annotated[int, Field(ge=4)] = 64
    """Titles are truncated to this many tokens, quotes included."""


class LoRAConfig(Section):
    """LoRA adapters in the LLM. Defaults follow the official TALLRec and CoLLM code."""

    rank: Count = 8
    """Inner width of an adapter."""
    alpha: Count = 16
    """Adapter outputs are scaled by alpha / rank."""
    dropout: Fraction = 0.05
    """Dropout of the adapters' inputs."""
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = ("q_proj", "v_proj")
    """Names of the linear layers that get an adapter."""


class LLaRALoRAConfig(LoRAConfig):
    """LoRA adapters with the defaults of the official LLaRA code."""

    alpha: Count = 32
    dropout: Fraction = 0.1
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    )  # fmt: skip


class LLM4RecConfig(Section):
    """Options that all LLM recommenders share. Defaults follow LLM-SRec's official code where papers are silent."""

    llm: LLMConfig
    prompt: Literal["code", "paper"] = "code"
    """Prompt template of the item lines: that of LLM-SRec's official code, or of the paper's Tables 1 and 2."""
    max_history: Count = 10
    """Number of latest items in the user prompt (official code; the paper is silent)."""
    max_vector_items: Annotated[int, Field(ge=0)] = 0
    """Extension: at most this many items older than those of `max_history` stand before them in the user prompt, each
    as a bare item vector of one token, without title and date. 0: none (paper)."""
    targets: Literal["last", "window", "all"] = "last"
    """Targets per user and step (retrieval): the last training item (official code); all items of a window of
    `max_history` + 1 items, a different one each epoch; or every item but the first (Appendix E.3)."""
    projected_dim: Count = 128
    """Width of the user and item vectors, output of f_user and f_item."""
    hidden_dim: Count = 2048
    """Hidden width of f_user and f_item."""
    readout_init: Literal["xavier", "standardized"] = "xavier"
    """Initialisation of f_user and f_item: `xavier` as in the official code, or `standardized`, where their input is
    standardized over a sample of users and items. Without it the read-outs of different users start with a cosine
    above 0.99; `standardized` starts them apart."""
    projector_init: Literal["xavier", "token_scale"] = "xavier"
    """Initialisation of f_I and f_U: `xavier` as in the official code, whose injected embeddings have many times the
    norm of the LLM's token embeddings; `token_scale`: their last layers are scaled to the norm of token embeddings."""
    train_candidates: Annotated[int, Field(ge=2)] | Literal["batch"] = 4
    """Target plus sampled negatives in Equation 1 (official code; the paper does not say). `batch` (extension): all
    distinct items of the global batch, i.e. the targets of all users and their `batch_negatives`, without the user's
    other items. The generation task lists as many candidates as the dataset stores for evaluation instead."""
    batch_negatives: Annotated[int, Field(ge=0)] = 3
    """Sampled negatives per target that enter the items of a batch (`train_candidates=batch`)."""
    log_q: bool = True
    """Subtract from each score the log-probability that its item gets into a batch, as in sampled softmax with shared
    candidates (`train_candidates=batch`). Without it, popular items are pushed down."""
    negative_policy: Literal["exclude_user", "official"] = "exclude_user"
    """`exclude_user`: negatives avoid all training items of the user. `official`: they avoid only the history before
    the target (its 128 latest items, shown or not), so that the target itself can be drawn as a negative."""


class TALLRecConfig(LLM4RecConfig):
    """TALLRec (Bao et al., RecSys 2023) as the paper adapts it: titles only, LoRA."""

    name: Literal["tallrec"]
    lora: LoRAConfig = LoRAConfig()


class LLaRAConfig(LLM4RecConfig):
    """LLaRA (Liao et al., SIGIR 2024) as the paper adapts it: an item vector behind each title, LoRA."""

    name: Literal["llara"]
    teacher: Path
    """Run folder of the trained SASRec whose item table is injected."""
    curriculum_steps: Count | None = None
    """Length of the curriculum: step s trains on titles only, leaving the projector untouched, with probability
    1 - s / curriculum_steps, and otherwise on titles and vectors (official code: all steps of the run). None: always
    titles and vectors, as in the paper."""
    lora: LLaRALoRAConfig = LLaRALoRAConfig()


class CoLLMConfig(LLM4RecConfig):
    """CoLLM (Zhang et al. 2023) as the paper adapts it: a user vector and item vectors, LoRA."""

    name: Literal["collm"]
    teacher: Path
    """Run folder of the trained SASRec whose user vectors and item table are injected."""
    projectors: Literal["separate", "shared"] = "separate"
    """`separate`: f_U and f_I of the paper. `shared`: one MLP for both, as in CoLLM's official code: Linear to 10 times
    the teacher's width, ReLU, Linear."""
    lora: LoRAConfig = LoRAConfig()


class ALLMRecConfig(LLM4RecConfig):
    """A-LLMRec (Kim et al., KDD 2024), stage 2: like CoLLM, but items go through the stage-1 encoder, and no LoRA."""

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
    user_vector: bool | Literal["end"] = False
    """Also inject the teacher's user vector: at the start of the user prompt (`true`: Table 11; CoLLM's prompt), or
    behind the history (`end`, extension), where the prompts of one window of targets still share all that precedes."""
    distillation: Literal["mse", "contrastive"] = "mse"
    """`mse`: Equation 2. `contrastive`: Equation 10 of Appendix E.2."""
    distill_normalize: bool = True
    """L2-normalise both vectors before distillation and uniformity (code and the text of the paper; not Eq. 2-3)."""
    mse_reduction: Literal["mean", "sum"] = "mean"
    """Over dimensions: `mean` is the official code, `sum` the squared distance of Equation 2."""
    distill_weight: Weight = 1.0
    """Weight of the distillation loss."""
    uniformity_weight: Weight = 1.0
    """Weight of the uniformity loss (Equation 3)."""
    score_distill_weight: Weight = 0.0
    """Extension: weight of a distillation of the teacher's scores, with `train_candidates=batch`: cross-entropy of the
    student's distribution over the items of the batch against the teacher's. 0: none (paper)."""
    teacher_titles: Weight = 0.0
    """Extension: weight of the titles in the teacher's vectors. Behind SASRec's vector of an item stands the mean token
    embedding of its title in the frozen LLM, whitened over the catalog; behind that of a user, those of the
    `max_history` latest items. The number is the spread of the titles' part of the scores, in that of SASRec's. What is
    injected into prompts and distilled then knows titles, too. 0: the teacher is SASRec alone (paper)."""
    contrastive_temperature: Annotated[float, Field(gt=0.0)] = 0.07
    """Temperature of the contrastive form of the distillation."""
    contrastive_symmetric: bool = False
    """Average the contrastive form with its transpose: each teacher vector's own student among all students."""
    teacher_dropout: bool = False
    """True leaves the teacher's dropout active during distillation, as the official code does by accident."""


def extensions(system: Section) -> tuple[str, ...]:
    """The settings by which an LLM recommender goes beyond the LLM-SRec paper, as `system.key=value`."""
    if not isinstance(system, LLM4RecConfig):
        return ()
    found = {
        "max_vector_items": system.max_vector_items > 0,
        "train_candidates": system.train_candidates == "batch",
        "user_vector": getattr(system, "user_vector", False) == "end",
        "score_distill_weight": isinstance(system, LLMSRecConfig) and system.score_distill_weight > 0,
        "teacher_titles": isinstance(system, LLMSRecConfig) and system.teacher_titles > 0,
    }
    return tuple(f"system.{key}={getattr(system, key)}" for key, extended in found.items() if extended)
