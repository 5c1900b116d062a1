"""The configuration of a run: frozen, typed sections, one per part of the trainer.

Torch-free, so that a login node can check a run before it is submitted. Defaults are those of the LLM-SRec paper and
its official code; where the two differ, the field's docstring says which one it follows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from trainer.config.choices import Candidates, HistoryOrder, RepeatDates, Task, Tie, TrackerName, TrainingOrder
from trainer.config.id_systems import BERT4RecConfig, GRU4RecConfig, NextItNetConfig, SASRecConfig
from trainer.config.llm_systems import ALLMRecConfig, CoLLMConfig, LLaRAConfig, LLMSRecConfig, TALLRecConfig
from trainer.config.section import Count, Fraction, PathText, Section, Seed
from trainer.config.text_systems import (
    ALLMRecStage1Config,
    CTRLAlignConfig,
    CTRLConfig,
    RecformerConfig,
    RecformerPretrainConfig,
)


class DataConfig(Section):
    """The dataset, and how it is read."""

    path: Path
    """Dataset folder, written by `python -m shards build`."""
    shuffle_shards: Count = 16
    """Users are shuffled within windows of this many shards; memory grows with it (about 1 KiB per user)."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Data loader processes per rank. 0: a thread of the training process builds the next batches during a step."""
    verify: bool = True
    """Check the sha256 of every file before the first step."""
    training_order: TrainingOrder = "original"
    """Order of the items that training reads. Any but `original` is drawn once per user, from `seed`, and is the same
    in every epoch; times stay, and so does the order of validation and test (KDD'25, §2.3, Tables 3 and 4). `window`:
    the items that the system reads before the last one, which stays the target. `history`: all items before the last
    one. `sequence`: all training items, the last one too: the meaning for systems to which every item is a target."""
    repeat_dates: RepeatDates = "own"
    """Date that prompts show for an item that a user has several times. `own`: each event its own. `last`: all of them
    the latest, that of held-out events included, as in LLM-SRec's official code, which stores one date per user and
    item; a date may then tell that an item comes again."""


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
"""One section per system. Every `Path` in a section is the folder of a run that the system builds on (`built_on`)."""


class TrainConfig(Section):
    """Optimisation, validation and checkpoints; defaults follow the paper's Appendix D and the official code's Adam."""

    init_from: Path | None = None
    """Run folder whose best weights training starts from, by the raw ids of items: next week's dataset with new users
    and items, or the same one with another learning rate. A new run in every other respect (schedule, Adam's moments).
    Not read when the run resumes. None: from scratch."""
    epochs: Count = 10
    """Passes over the training users; early stopping may end a run before."""
    max_steps: Count | None = None
    """Stop after this many optimizer steps, even if epochs are left. None: train all epochs."""
    batch_size: Count = 20
    """Global batch size: users per step over all ranks. The result does not depend on the number of ranks."""
    micro_batch_size: Count | None = None
    """Users that a rank runs at a time. Less than the rank's share saves memory and costs one extra forward pass. None:
    the whole share."""
    lr: Annotated[float, Field(gt=0.0)] = 1e-4
    """Peak learning rate of Adam."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps of linear warm-up: the learning rate reaches `lr` at this step. 0: no warm-up."""
    decay_steps: Count | None = None
    """Linear decay of the learning rate to 0 at this step. None: no such decay."""
    decay_from: Annotated[int, Field(ge=0)] = 0
    """Step at which that decay begins, not before the end of the warm-up. A late one (warmup-stable-decay, Hu et al.
    2024) keeps the rate for most of the run, and ends without the noise of a constant rate."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.98)
    """Adam's decay rates."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """L2 penalty of the trained parameters, as in torch's Adam, not decoupled as in AdamW."""
    grad_clip: Annotated[float, Field(ge=0.0)] = 0.0
    """Maximum gradient norm. 0: no clipping."""
    lr_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 0.95
    """Factor on the learning rate after each validation (official code). 1.0 keeps it constant."""
    validate_every: Annotated[float, Field(gt=0.0)] = 0.1
    """Epochs between validations; the last step of the run always validates."""
    patience: Count = 10
    """Early stopping: end after this many validations without a better `metric` (paper; official code: 5)."""
    metric: Literal["HR@1", "HR@5", "HR@10", "HR@20", "NDCG@1", "NDCG@5", "NDCG@10", "NDCG@20", "MRR"] = "HR@10"
    """Validation metric that decides the best checkpoint and early stopping."""
    save_minutes: Annotated[float, Field(gt=0.0)] | None = 5.0
    """Minutes between checkpoints, by rank 0's clock; each is written early enough that at most this much work is lost.
    By time rather than by steps, saving costs the same share of the time on any device (0.2 % at 3B,
    `benchmarks/README.md`). None: by `save_every` only."""
    save_every: Count | None = None
    """Steps between checkpoints. None: by `save_minutes` only."""
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2
    """Latest checkpoints to keep besides the best one; at least two, so that a damaged one has a predecessor."""
    log_every: Count = 10
    """Steps between points of `metrics.jsonl` and the trackers. Log lines are at least ten seconds apart; 1 logs every
    step."""
    trackers: tuple[TrackerName, ...] = ("tensorboard",)
    """Where metrics go besides `metrics.jsonl`. All but TensorBoard need the package of their name; project and server
    are set by their own environment variables (`WANDB_MODE=offline`, `MLFLOW_TRACKING_URI`)."""

    @model_validator(mode="after")
    def _checkpoints_are_written(self) -> Self:
        if self.save_every is None and self.save_minutes is None:
            raise ValueError("no checkpoint would be written: set train.save_minutes or train.save_every")
        return self

    @model_validator(mode="after")
    def _decay_has_steps(self) -> Self:
        if self.decay_from and (self.decay_steps is None or self.decay_from >= self.decay_steps):
            raise ValueError(
                f"decay_from={self.decay_from} without a later end of the decay: set train.decay_steps to the steps of "
                "the run, or leave decay_from out"
            )
        return self


class EvaluationConfig(Section):
    """Ranking in validation and in the final test."""

    batch_size: Count = 128
    """Users (or item prompts) that a rank encodes at a time."""
    users: Count | None = None
    """Evaluate a fixed, seeded sample of this many users, on a temporal split about so many that have a target. None:
    all users."""
    valid_users: Count | None = None
    """Validate on a fixed, seeded sample of this many users during training; the final test uses `users`. None: as
    `users`."""
    candidates: Candidates = "sampled"
    """`sampled`: the stored negatives of the dataset (1+99); `full`: every item that the user has not seen;
    `full_with_seen`: all items."""
    tie: Tie = "expectation"
    """How a target ranks among items of equal score."""
    decode: bool = True
    """In the generation task, the test also decodes answers greedily and scores them (the paper's literal protocol)."""
    lists: bool = True
    """Tests also list the ten best items of the catalog per user, and record how varied, popular and new the lists are.
    Costs a product of each user's vector with all items; validations never do. Not for title generation."""
    test_histories: tuple[HistoryOrder, ...] = ("original", "shuffled")
    """Histories that the best checkpoint is tested on after training."""
    seed: Seed = 0
    """Seed of the user sample, the shuffled histories and the bootstrap."""


class EngineConfig(Section):
    """DeepSpeed, threads and the watchdog."""

    deepspeed: PathText = "zero1"
    """A name in `ds_configs/` or the path of a DeepSpeed JSON file."""
    threads: Annotated[int, Field(ge=0)] = 0
    """CPU threads per rank. 0: OMP_NUM_THREADS, or without it the cores of this machine divided by the ranks on it."""
    deterministic: bool = False
    """On CUDA, repeat a run bit for bit on the same kind of GPU and the same number of ranks: torch's deterministic
    algorithms, also in the backward pass of attention, which otherwise adds in the order in which blocks finish. Costs
    a slower backward pass and more memory there. A CPU repeats a run without it."""
    timeout: Annotated[float, Field(ge=1.0)] = 300.0
    """Seconds without progress after which all ranks dump their stacks and exit; ten times as long until the first step
    is done, at the start of an epoch, in a validation and in the test."""


class RunConfig(Section):
    """One training run."""

    output: Path
    """Run folder: checkpoints, logs and results are written here."""
    data: DataConfig
    system: SystemConfig
    task: Task = "retrieval"
    """`retrieval` ranks the target among the stored 1+99 candidates by inner product; `generation` chooses the
    next item's title among 1+19."""
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    engine: EngineConfig = EngineConfig()
    seed: Seed = 0
    """Seed of everything random in training: initialisation, sample order, negatives, masks, dropout."""
    resume: Literal["auto", "never"] = "auto"
    """`auto` resumes from the newest intact checkpoint in `output`; `never` refuses a folder that has one."""


def built_on(system: Section) -> dict[str, Path]:
    """Folders of the runs that a system builds on, by key (`teacher`, ...): every `Path` in its section."""
    values: dict[str, Any] = {name: getattr(system, name) for name in type(system).model_fields}
    return {name: value for name, value in values.items() if isinstance(value, Path)}


def reads_titles_alone(system: Section) -> bool:
    """Whether a system reads the items of a history by their texts alone, and so can read unknown items."""
    return isinstance(system, TALLRecConfig | RecformerConfig | RecformerPretrainConfig)
