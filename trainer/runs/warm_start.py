"""The run that a new one starts from (`train.init_from`): found and checked; torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from shards.manifest import DatasetError, Manifest, check_sizes, read_manifest
from trainer.config.id_systems import BERT4RecConfig, GRU4RecConfig, NextItNetConfig, SASRecConfig
from trainer.config.llm_systems import LLM4RecConfig
from trainer.config.load import ConfigError
from trainer.config.schema import RunConfig
from trainer.runs.folder import Checkpoint, CheckpointError, RunFolder
from trainer.runs.requirements import Sources

_SUPPORTED = (SASRecConfig, GRU4RecConfig, BERT4RecConfig, NextItNetConfig, LLM4RecConfig)
_SHAPES = frozenset(
    {"dim", "max_length", "blocks", "heads", "norm", "hidden", "layers", "block", "kernel", "dilations"}
    | {"hidden_dim", "projected_dim", "projectors", "user_vector", "distillation", "lora", "teacher_titles"}
)
"""Settings of a system that decide the shapes or the meaning of its weights."""


@dataclass(frozen=True)
class WarmStart:
    """A trained run whose best weights a new run starts from."""

    path: Path
    checkpoint: Checkpoint
    """Its best checkpoint."""
    data: Path
    """Its dataset, which says what item each row of its tables belongs to."""
    manifest: Manifest
    teacher_follows: bool
    """Whether the new run's teacher is the old run's, or was itself started from it; True without a teacher. Otherwise
    the weights that read the teacher's vectors start from vectors that mean something else."""


def find_warm_start(config: RunConfig, sources: Sources) -> WarmStart | None:
    """Find the run that `train.init_from` names; None if it names none, or the run has checkpoints to resume from.

    Raises:
        ValueError: not a trained run, a damaged checkpoint, another system or shape, or its dataset is gone; the
            message names the cure.
    """
    path = config.train.init_from
    if path is None or RunFolder(config.output).steps():
        return None
    key = f"train.init_from={path}"
    if not isinstance(config.system, _SUPPORTED):
        raise ConfigError(f"{key}: {config.system.name} cannot start from another run yet: leave it out")
    if not (path / "config.yaml").is_file():
        raise ConfigError(f"{key} is not a run folder (no config.yaml in it): fix the path, or leave it out")
    source = RunFolder(path).config()
    _check_alike(config, source, key)
    try:
        checkpoint = RunFolder(path).best()
    except CheckpointError as error:
        raise CheckpointError(f"{key} cannot be used: {error}") from None
    manifest = _dataset_of(source.data.path, checkpoint, key)
    _check_titles(config, manifest, key)
    return WarmStart(path, checkpoint, source.data.path, manifest, _teacher_follows(checkpoint, sources))


def _check_alike(config: RunConfig, source: RunConfig, key: str) -> None:
    here, there = config.system, source.system
    if here.name != there.name:
        raise ConfigError(f"{key} is a run of {there.name}, not of {here.name}: give a run of the same system")
    if config.task != source.task:
        raise ConfigError(f"{key} was trained for task={source.task}, not {config.task}: set task={source.task}")
    names = sorted(_SHAPES & set(type(here).model_fields))
    pairs = [(name, getattr(there, name), getattr(here, name)) for name in names]
    if isinstance(here, LLM4RecConfig) and isinstance(there, LLM4RecConfig):
        pairs += [("llm.layers", there.llm.layers, here.llm.layers)]
    for name, old, new in pairs:
        if old != new:
            raise ConfigError(
                f"{key} has system.{name}={old}, this run has {new}: set system.{name}={old}, or train from scratch"
            )


def _check_titles(config: RunConfig, old: Manifest, key: str) -> None:
    """Refuse titles of another catalog: their vectors have other directions, which the old weights would misread."""
    weight = getattr(config.system, "teacher_titles", 0.0)
    if weight and read_manifest(config.data.path).fingerprint != old.fingerprint:
        raise ConfigError(
            f"{key} was trained on another dataset, and system.teacher_titles={weight} whitens titles over it: "
            "train from scratch"
        )


def _dataset_of(path: Path, checkpoint: Checkpoint, key: str) -> Manifest:
    cure = "put that dataset back, and build the new one into a folder of its own"
    try:
        manifest = read_manifest(path)
        check_sizes(path, manifest)
    except DatasetError as error:
        raise DatasetError(
            f"{key}: the ids of its items are in its dataset, which cannot be read ({error}); {cure}"
        ) from None
    if manifest.fingerprint != checkpoint.identity.dataset_fingerprint:
        raise DatasetError(
            f"{key}: the ids of its items are in the dataset that it was trained on, but {path} holds another one now: "
            + cure
        )
    return manifest


def _teacher_follows(checkpoint: Checkpoint, sources: Sources) -> bool:
    if sources.teacher is None:
        return True
    teacher, old = sources.teacher.checkpoint, checkpoint.identity.built_on.get("teacher")
    return old in (teacher.weights_sha256, teacher.identity.init_from)
