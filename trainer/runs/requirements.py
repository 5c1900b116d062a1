"""Checks what a run needs besides its dataset, and finds the runs that it builds on; torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from shards.manifest import Manifest
from trainer.config.choices import Task
from trainer.config.id_systems import SASRecConfig
from trainer.config.llm_systems import ALLMRecConfig, LLM4RecConfig, LLMConfig, LLMSRecConfig
from trainer.config.load import ConfigError
from trainer.config.schema import EvaluationConfig, RunConfig, built_on
from trainer.config.section import Section
from trainer.config.text_systems import (
    ALLMRecStage1Config,
    CTRLAlignConfig,
    CTRLConfig,
    EncoderConfig,
    RecformerConfig,
    RecformerPretrainConfig,
)
from trainer.runs.folder import Checkpoint, CheckpointError, RunFolder
from trainer.runs.model_folder import check_encoder_path, check_llm_path, quantization_of

_MOST_TARGETS = 10_000
"""Targets of one user in a step; each is a branch of some dozen tokens."""
_PRESETS = {"recformer": "recformer_stage1"}
"""Presets whose names are not those of their systems."""

SectionT = TypeVar("SectionT", bound=Section)


@dataclass(frozen=True)
class SourceRun(Generic[SectionT]):
    """A trained run that a different run builds on."""

    path: Path
    system: SectionT
    """System section that the run was trained with."""
    checkpoint: Checkpoint
    """Best checkpoint of the run; the sha256 of every file was checked."""


@dataclass(frozen=True)
class Sources:
    """The runs that a system builds on, found and checked; None for each kind that it does not use."""

    teacher: SourceRun[SASRecConfig] | None = None
    """The frozen SASRec that item and user vectors are read from."""
    a_llmrec_stage1: SourceRun[ALLMRecStage1Config] | None = None
    """Stage 1 of A-LLMRec, which stage 2 builds on."""
    ctrl_align: SourceRun[CTRLAlignConfig] | None = None
    """The contrastive alignment that CTRL starts from."""
    recformer_pretrain: SourceRun[RecformerPretrainConfig] | None = None
    """The pre-training that RECFORMER's stage 1 starts from."""
    recformer_stage1: SourceRun[RecformerConfig] | None = None
    """Stage 1 of RECFORMER, which stage 2 starts from."""


def check_requirements(config: RunConfig, manifest: Manifest) -> Sources:
    """Check that everything the system needs exists; returns the runs that it builds on.

    Raises:
        ValueError: something is missing or does not fit; the message names it and the cure.
    """
    system = config.system
    check_task(config, config.task, config.evaluation)
    if config.task == "generation" and config.train.metric != "HR@1":
        raise ConfigError(f"task=generation is validated by HR@1, not by {config.train.metric}: set train.metric=HR@1")
    sources = find_sources(config, manifest)
    if isinstance(system, LLM4RecConfig):
        _check_training(config, system)
        _check_lengths(system, config, manifest)
        _check_used(system, sources.teacher)
        _check_vector_items(system, sources.teacher)
        _check_llm(config, system)
    if isinstance(encoder := getattr(system, "encoder", None), EncoderConfig):
        check_encoder_path(encoder.path)
    if isinstance(system, RecformerConfig | RecformerPretrainConfig):
        _check_targets(config, manifest)
    return sources


def find_sources(config: RunConfig, manifest: Manifest) -> Sources:
    """Find the runs that the system builds on.

    Raises:
        CheckpointError: a run is missing, damaged, of the wrong system, or was trained on a different catalog.
    """
    match config.system:
        case ALLMRecConfig() as system:
            return Sources(
                teacher=_find(system.teacher, "teacher", SASRecConfig, config, manifest),
                a_llmrec_stage1=_find(system.stage1, "stage1", ALLMRecStage1Config, config, manifest),
            )
        case CTRLConfig(aligned=Path() as path) as system:
            return Sources(ctrl_align=_find_aligned(system, path, config, manifest))
        case RecformerConfig(pretrained=Path() as path) as system:
            pretrained = _find(path, "pretrained", RecformerPretrainConfig, config, manifest)
            _check_reads_alike(system, "pretrained", path, pretrained.system)
            return Sources(recformer_pretrain=pretrained)
        case RecformerConfig(stage1=Path() as path) as system:
            return Sources(recformer_stage1=_find_first_stage(system, path, config, manifest))
        case system:
            if not (teacher := built_on(system).get("teacher")):
                return Sources()
            return Sources(teacher=_find(teacher, "teacher", SASRecConfig, config, manifest))


def _check_training(config: RunConfig, system: LLM4RecConfig) -> None:
    """Check that the targets and candidates are possible for the task, the training order and the batch size."""
    batch = system.train_candidates == "batch"
    if config.task == "generation" and system.targets != "last":
        raise ConfigError(f"system.targets={system.targets} is for task=retrieval only: set system.targets=last")
    if config.task == "generation" and batch:
        raise ConfigError("system.train_candidates=batch is for task=retrieval only: leave it out")
    if config.data.training_order == "window" and system.targets != "last":
        raise ConfigError(
            f"data.training_order=window keeps the last item as the only target, but system.targets={system.targets} "
            "has others: set data.training_order=sequence, or system.targets=last"
        )
    if batch and system.negative_policy == "official":
        raise ConfigError(
            "system.train_candidates=batch leaves out all items of a user: set system.negative_policy=exclude_user"
        )
    if batch and not system.batch_negatives and config.train.batch_size == 1:
        raise ConfigError(
            "system.train_candidates=batch with train.batch_size=1 and system.batch_negatives=0 leaves no item to "
            "compare a target with: set system.batch_negatives=3, or a larger train.batch_size"
        )


def _check_lengths(system: LLM4RecConfig, config: RunConfig, manifest: Manifest) -> None:
    """Refuse a prompt for each item of a user with very many, who alone would fill the memory."""
    longest = manifest.statistics.max_length
    if system.targets == "all" and longest > _MOST_TARGETS:
        raise ConfigError(
            f"system.targets=all makes a target of each item, and a user of {config.data.path} has {longest:,}: set "
            "system.targets=window or last"
        )


def _check_used(system: LLM4RecConfig, teacher: SourceRun[SASRecConfig] | None) -> None:
    """Refuse settings that would silently change nothing."""
    if teacher is None and system.projector_init != "xavier":
        raise ConfigError(
            f"system.projector_init={system.projector_init}, but this system has no projectors: leave it out"
        )
    if isinstance(system, LLMSRecConfig) and system.score_distill_weight and system.train_candidates != "batch":
        raise ConfigError(
            f"system.score_distill_weight={system.score_distill_weight} distils the scores of the batch's items: "
            "set system.train_candidates=batch, or leave it out"
        )


def _check_vector_items(system: LLM4RecConfig, teacher: SourceRun[SASRecConfig] | None) -> None:
    """Check that there are item vectors to show, and that the student sees no more items than its teacher."""
    key = f"system.max_vector_items={system.max_vector_items}"
    if not system.max_vector_items:
        return
    if teacher is None:
        raise ConfigError(
            f"{key} shows a teacher's item vectors, but this system shows titles alone: leave it out, or train llara, "
            "collm, a_llmrec or llm_srec"
        )
    shown, window = system.max_history + system.max_vector_items, teacher.system.max_length
    if shown > window:
        most = max(window - system.max_history, 0)
        raise ConfigError(
            f"{key} and system.max_history={system.max_history} show {shown} items, but the teacher {teacher.path} "
            f"reads only {window}: set system.max_vector_items={most} or less, or train a teacher with "
            f"system.max_length={shown}"
        )


def _check_llm(config: RunConfig, system: LLM4RecConfig) -> None:
    if hasattr(system, "lora"):
        _check_adaptable(system.llm)
    check_llm_path(system.llm.path)
    if system.llm.quantization != "none" and (method := quantization_of(Path(system.llm.path))):
        raise ConfigError(
            f"system.llm.quantization={system.llm.quantization} cannot round weights that are quantized already "
            f"({system.llm.path}: {method}): set system.llm.quantization=none, or system.llm.path to the same model in "
            "bf16 or fp32"
        )
    if system.llm.quantization == "fp8" and system.llm.dtype != "bfloat16":
        raise ConfigError(
            f"system.llm.quantization=fp8 computes in bfloat16, not in {system.llm.dtype}: "
            "set system.llm.dtype=bfloat16, or quantization=none"
        )
    if system.llm.title_store is not None:
        check_prefix_cacheable(config, system)
        _check_prefix_cache(Path(system.llm.title_store))


def check_task(config: RunConfig, task: Task, evaluation: EvaluationConfig) -> None:
    """Check that the run's system supports a task, and the task the evaluation settings.

    Raises:
        ConfigError: it does not; the message names the cure.
    """
    name = config.system.name
    if task == "generation" and evaluation.candidates != "sampled":
        raise ConfigError("task=generation chooses among the stored titles: set evaluation.candidates=sampled")
    if isinstance(config.system, LLM4RecConfig):
        if task != config.task:
            raise ConfigError(f"this {name} was trained for task={config.task}, not {task}: train one with task={task}")
        if task == "generation" and isinstance(config.system, LLMSRecConfig):
            raise ConfigError(
                f"{name} does not support task=generation: set task=retrieval, or train llara, which has its prompts"
            )


def check_plannable(config: RunConfig, devices: int) -> LLM4RecConfig:
    """Refuse to plan for a system without an LLM, or for more devices than a batch has users; returns the system.

    Raises:
        ConfigError: the message has the cure.
    """
    _check_shares(config, devices)
    if not isinstance(config.system, LLM4RecConfig):
        raise ConfigError(f"{config.system.name} has no large language model to plan for")
    return config.system


def is_by_id(system: Section) -> bool:
    """Whether a system knows items by id alone, and builds on no other run."""
    return not built_on(system) and not any(hasattr(system, name) for name in ("llm", "encoder", "backbone"))


def check_id_plannable(config: RunConfig, devices: int) -> None:
    """Refuse to plan for a system that reads texts without an LLM, or for more devices than a batch has users.

    Raises:
        ConfigError: the message has the cure.
    """
    _check_shares(config, devices)
    if not is_by_id(config.system):
        raise ConfigError(
            f"{config.system.name} cannot be planned: only systems by id and those around a large language model can"
        )


def _check_shares(config: RunConfig, devices: int) -> None:
    if devices > config.train.batch_size:
        raise ConfigError(f"{devices} devices cannot share a batch of {config.train.batch_size} users")


def check_recommends(config: RunConfig) -> None:
    """Check that the run has user and item vectors, by which the catalog can be searched.

    Raises:
        ConfigError: it does not; the message names the cure.
    """
    if config.task == "generation" and isinstance(config.system, LLM4RecConfig):
        raise ConfigError(f"{config.output} can only choose among given titles: recommend with a run of task=retrieval")


def _find_aligned(system: CTRLConfig, path: Path, config: RunConfig, manifest: Manifest) -> SourceRun[CTRLAlignConfig]:
    found = _find(path, "aligned", CTRLAlignConfig, config, manifest)
    for key in ("backbone", "adapter"):
        if getattr(found.system, key) != getattr(system, key):
            raise CheckpointError(
                f"system.aligned={path} has a different {key}: set system.{key} as in {path / 'config.yaml'}"
            )
    return found


def _find_first_stage(
    system: RecformerConfig, path: Path, config: RunConfig, manifest: Manifest
) -> SourceRun[RecformerConfig]:
    found = _find(path, "stage1", RecformerConfig, config, manifest)
    if found.system.stage != 1:
        raise CheckpointError(f"system.stage1={path} is a run of stage 2: give the run of stage 1")
    _check_reads_alike(system, "stage1", path, found.system)
    return found


def _check_reads_alike(
    system: RecformerConfig, key: str, path: Path, found: RecformerConfig | RecformerPretrainConfig
) -> None:
    """Check that a source run was trained with the same `max_items` and `pooling`."""
    for setting in ("max_items", "pooling"):
        if (value := getattr(found, setting)) != getattr(system, setting):
            raise CheckpointError(f"system.{key}={path} has {setting}={value}: set system.{setting}={value}")


def _check_targets(config: RunConfig, manifest: Manifest) -> None:
    """Check that every user has at least two training items, for a target needs a history."""
    least = manifest.build.get("min_train")
    if isinstance(least, int) and least < 2:
        raise ConfigError(
            f"{config.data.path} was built with --min-train {least}, but {config.system.name} needs two training items "
            "per user: build it with --min-train 2 or more"
        )


def _find(path: Path, key: str, kind: type[SectionT], config: RunConfig, manifest: Manifest) -> SourceRun[SectionT]:
    """Find the run that `system.<key>` names.

    Raises:
        CheckpointError: not a run, of the wrong system, damaged, or trained on a different catalog.
    """
    data = config.data.path
    name = kind.model_fields["name"].annotation.__args__[0]  # type: ignore[union-attr]
    train_one = f"train one with `llm-srec train {_PRESETS.get(name, name)} data.path={data} output={path}`"
    run = RunFolder(path)
    if not (path / "config.yaml").is_file():
        raise CheckpointError(f"system.{key}={path} is not a run folder: {train_one}, or fix the path")
    system = run.config().system
    if not isinstance(system, kind):
        raise CheckpointError(f"system.{key}={path} is a {system.name} run, not a {name} run: fix the path")
    try:
        checkpoint = run.best()
    except CheckpointError as error:
        raise CheckpointError(f"the {key} cannot be used: {error}; or train a new {key}") from None
    if checkpoint.identity.catalog_sha256 != manifest.catalog_sha256:
        raise CheckpointError(
            f"the {key} {path} was trained on a different catalog than {data}: "
            f"train a {key} on this dataset, or set data.path to the dataset of the {key}"
        )
    return SourceRun(path, system, checkpoint)


def _check_adaptable(llm: LLMConfig) -> None:
    """Refuse LoRA on quantized weights: gradients through them are not the exact ones that the tests check."""
    if llm.quantization != "none":
        raise ConfigError(
            f"system.lora cannot adapt an LLM in {llm.quantization}: set system.llm.quantization=none, "
            "or train a system without LoRA (llm_srec, a_llmrec)"
        )
    if quantization_of(Path(llm.path)):
        raise ConfigError(
            f"system.lora cannot adapt {llm.path}, whose weights are quantized: set system.llm.path to the same "
            "model in bf16 or fp32, or train a system without LoRA (llm_srec, a_llmrec)"
        )


def check_prefix_cacheable(config: RunConfig, system: LLM4RecConfig) -> None:
    """Refuse a prefix cache where the keys of titles are trained, or where no prompt begins with a title.

    Raises:
        ConfigError: a prefix cache cannot be used; the message gives the reason and the cure.
    """
    why = None
    if hasattr(system, "lora"):
        why = f"{config.system.name} trains adapters, which change the KV cache of titles"
    elif config.task == "generation":
        why = "task=generation has no item prompts"
    elif system.llm.packing == "rows":
        why = "system.llm.packing=rows runs whole prompts"
    if why:
        raise ConfigError(f"system.llm.title_store cannot be used because {why}: leave it out")


def _check_prefix_cache(folder: Path) -> None:
    if not (folder / "store.json").is_file():
        raise ConfigError(
            f"system.llm.title_store={folder} is not a prefix cache: compute it with "
            "`llm-srec title-store PRESET section.key=value ...` with this run's settings, or leave it out"
        )
