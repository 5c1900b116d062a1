"""What a run is made of: frozen, typed sections, one per part of the trainer.

Nothing here imports torch, so that a login node can check a run before it is submitted. The defaults are those of
the LLM-SRec paper and its official code; where the two differ, each field says which one it follows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from trainer.config.choices import Candidates, HistoryOrder, Task, Tie
from trainer.config.id_systems import BERT4RecConfig, GRU4RecConfig, NextItNetConfig, SASRecConfig
from trainer.config.llm_systems import ALLMRecConfig, CoLLMConfig, LLaRAConfig, LLMSRecConfig, TALLRecConfig
from trainer.config.section import Count, Fraction, Section
from trainer.config.text_systems import (
    ALLMRecStage1Config,
    CTRLAlignConfig,
    CTRLConfig,
    RecformerConfig,
    RecformerPretrainConfig,
)


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


SystemConfig = Annotated[
    SASRecConfig
    | GRU4RecConfig
    | BERT4RecConfig
    | NextItNetConfig
    | TALLRecConfig
    | LLaRAConfig
    | CoLLMConfig
    | ALLMRecConfig
    | LLMSRecConfig
    | ALLMRecStage1Config
    | CTRLConfig
    | CTRLAlignConfig
    | RecformerPretrainConfig
    | RecformerConfig,
    Field(discriminator="name"),
]
"""One section a system. Every `Path` in it is the folder of a run that the system builds on (see `built_on`)."""


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
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """The learning rate rises linearly over the first steps and reaches `lr` at this one; 0 starts with all of it."""
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
    save_minutes: Annotated[float, Field(gt=0.0)] | None = 5.0
    """A checkpoint is written before this much work is not in one, by rank 0's clock: a save then costs the same share
    of the time on any device (0.2 % at 3B, `benchmarks/README.md`). None: by steps alone."""
    save_every: Count | None = None
    """Steps between checkpoints; None: by time alone."""
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2
    """How many of the latest to keep beside the best one; two, so that a damaged one has a predecessor."""
    log_every: Count = 10
    """Steps between lines in the log and points in TensorBoard."""

    @model_validator(mode="after")
    def _checkpoints_are_written(self) -> Self:
        if self.save_every is None and self.save_minutes is None:
            raise ValueError("no checkpoint would be written: set train.save_minutes or train.save_every")
        return self


class EvaluationConfig(Section):
    """How validation and the final test rank."""

    batch_size: Count = 128
    """Users (or item prompts) a rank encodes at a time."""
    users: Count | None = None
    """Evaluate a fixed, seeded sample of this many users. None: all of them."""
    valid_users: Count | None = None
    """Validate on a fixed, seeded sample of this many users while training; the final test uses `users`."""
    candidates: Candidates = "sampled"
    """`sampled`: the stored negatives of the dataset (1+99); `full`: every item the user has not seen."""
    tie: Tie = "expectation"
    decode: bool = True
    """In the generation task, the test also writes answers greedily and judges them (the paper's literal protocol)."""
    test_histories: tuple[HistoryOrder, ...] = ("original", "shuffled")
    """What the best checkpoint is tested on when training ends."""
    seed: int = 0
    """Of the user sample, the shuffled histories and the bootstrap."""


class EngineConfig(Section):
    """DeepSpeed."""

    deepspeed: str = "zero1"
    """A name in `ds_configs/` or the path of a DeepSpeed JSON file."""
    threads: Annotated[int, Field(ge=0)] = 0
    """CPU threads a rank. 0: the cores of this machine divided by the ranks on it."""
    timeout: Annotated[float, Field(ge=1.0)] = 300.0
    """Seconds without progress after which all ranks write their stacks and end; ten times as long until the first
    step is done, at the start of an epoch and within a validation."""


class RunConfig(Section):
    """One training run."""

    output: Path
    """Run folder: checkpoints, logs and results are written here."""
    data: DataConfig
    system: SystemConfig
    task: Task = "retrieval"
    """`retrieval` ranks the target among the stored 1+99 candidates by inner product; `generation` chooses the title
    to come next among 1+19."""
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    engine: EngineConfig = EngineConfig()
    seed: int = 0
    resume: Literal["auto", "never"] = "auto"
    """`auto` goes on from the newest intact checkpoint in `output`; `never` refuses a folder that holds one."""


def built_on(system: Section) -> dict[str, Path]:
    """The runs that a system builds on, by key (`teacher`, ...): every path in its section."""
    values: dict[str, Any] = {name: getattr(system, name) for name in type(system).model_fields}
    return {name: value for name, value in values.items() if isinstance(value, Path)}
