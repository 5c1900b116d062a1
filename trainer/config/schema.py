"""What a run is made of: frozen, typed sections, one per part of the trainer.

Nothing here imports torch, so that a login node can check a run before it is submitted. The defaults are those of
the LLM-SRec paper and its official code; where the two differ, each field says which one it follows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """Parent of every section: unknown keys are refused, numbers are finite, values cannot change after loading."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


class DataConfig(Section):
    """Which dataset to read and how."""

    path: Path
    """Folder written by `python -m shards build`."""
    shuffle_shards: Count = 16
    """Users are shuffled over this many shards at a time; memory grows with it (about 1 KiB a user)."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Loader processes. 0 prepares batches in the training process."""
    verify: bool = True
    """Check the sha256 of every file before the first step."""


class LLMConfig(Section):
    """The frozen language model."""

    path: str
    """Folder (or hub id) of a causal LM in Hugging Face layout: config, safetensors, tokenizer."""
    layers: Count | None = None
    """Run only the first k decoder layers (small machines). None: all of them."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    row_tokens: Annotated[int, Field(ge=64)] = 1024
    """Length of a packed row, and so the longest prompt, in tokens."""
    max_title_tokens: Annotated[int, Field(ge=4)] = 64
    """A title keeps at most this many tokens, quotes included."""


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
    distill_weight: Annotated[float, Field(ge=0.0)] = 1.0
    uniformity_weight: Annotated[float, Field(ge=0.0)] = 1.0
    contrastive_temperature: Annotated[float, Field(gt=0.0)] = 0.07
    contrastive_symmetric: bool = False
    teacher_dropout: bool = False
    """True keeps the teacher's dropout on while it is distilled, as the official code does by accident."""


SystemConfig = Annotated[SASRecConfig | LLMSRecConfig, Field(discriminator="name")]


class TrainConfig(Section):
    """Optimisation; defaults are the paper's Appendix D and the official code's Adam."""

    epochs: Count = 10
    max_steps: Count | None = None
    """Stop after this many optimizer steps even if epochs are left."""
    batch_size: Count = 20
    """Users a step over all ranks: the result does not depend on how many ranks share them."""
    micro_batch_size: Count | None = None
    """Users a rank runs at a time. Smaller than its share saves memory and costs one extra forward pass."""
    lr: Annotated[float, Field(gt=0.0)] = 1e-4
    betas: tuple[Fraction, Fraction] = (0.9, 0.98)
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    grad_clip: Annotated[float, Field(ge=0.0)] = 0.0
    """Largest gradient norm; 0 does not clip."""
    lr_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 0.95
    """The learning rate is multiplied by this after each validation (official code; 1.0 keeps it constant)."""
    validate_every: Annotated[float, Field(gt=0.0)] = 0.1
    """Epochs between validations; the last step of the run always validates."""
    patience: Count = 10
    """Stop after this many validations without a better `metric` (paper; the official code has 5)."""
    metric: Literal["HR@1", "HR@5", "HR@10", "HR@20", "NDCG@1", "NDCG@5", "NDCG@10", "NDCG@20", "MRR"] = "HR@10"
    save_every: Count = 50
    """Steps between checkpoints."""
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2
    """How many of the latest to keep beside the best one; two, so that a damaged one has a predecessor."""
    log_every: Count = 10
    """Steps between lines in the log and points in TensorBoard."""


class EvaluationConfig(Section):
    """How validation and the final test rank."""

    batch_size: Count = 128
    """Users (or item prompts) a rank encodes at a time."""
    users: Count | None = None
    """Evaluate a fixed, seeded sample of this many users. None: all of them."""
    valid_users: Count | None = None
    """Validate on a fixed, seeded sample of this many users while training; the final test uses `users`."""
    candidates: Literal["sampled", "full"] = "sampled"
    """`sampled`: the stored negatives of the dataset (1+99); `full`: every item the user has not seen."""
    tie: Literal["expectation", "optimistic", "pessimistic"] = "expectation"
    test_histories: tuple[Literal["original", "shuffled"], ...] = ("original", "shuffled")
    """What the best checkpoint is tested on when training ends."""
    seed: int = 0
    """Of the user sample, the shuffled histories and the bootstrap."""


class EngineConfig(Section):
    """DeepSpeed."""

    deepspeed: str = "zero1"
    """A name in `ds_configs/` or the path of a DeepSpeed JSON file."""
    threads: Annotated[int, Field(ge=0)] = 0
    """CPU threads a rank. 0: the cores of this machine divided by the ranks on it."""


class RunConfig(Section):
    """One training run."""

    output: Path
    """Run folder: checkpoints, logs and results are written here."""
    data: DataConfig
    system: SystemConfig
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    engine: EngineConfig = EngineConfig()
    seed: int = 0
    resume: Literal["auto", "never"] = "auto"
    """`auto` goes on from the newest intact checkpoint in `output`; `never` refuses a folder that holds one."""
