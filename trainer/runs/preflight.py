"""Preflight: checks of a run before anything expensive starts. Torch-free, so that a login node can run them too."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.manifest import DatasetError, Manifest, check_sizes, read_manifest
from trainer.config import ConfigError, RunConfig, TrainConfig, config_hash, flatten, parse_config
from trainer.config.deepspeed_json import load_deepspeed_json, zero_stage
from trainer.runs.batch_shares import micro_batch_count, num_steps
from trainer.runs.exported import BaseModel, ExportFacts, is_export, read_config, read_facts, with_base_model
from trainer.runs.folder import Checkpoint, CheckpointError, RunFolder
from trainer.runs.model_folder import may_be_hub_id, quantization_of
from trainer.runs.requirements import Sources, check_requirements
from trainer.runs.warm_start import WarmStart, find_warm_start

START_OVER = "choose another output, or remove the folder to start over"


@dataclass(frozen=True)
class Preflight:
    """A run that passed the preflight, and what the checks found on the way."""

    config: RunConfig
    ranks: int
    manifest: Manifest
    sources: Sources
    """The runs that the system builds on."""
    micro_batches: int
    """Forward passes per rank and optimizer step."""
    warm_start: WarmStart | None
    """The run that training starts from; None: from scratch, or from a checkpoint of its own."""
    deepspeed: dict[str, Any]
    """Configuration that `deepspeed.initialize` takes."""

    @property
    def zero_stage(self) -> int:
        """ZeRO stage of the DeepSpeed configuration."""
        return zero_stage(self.deepspeed)


def preflight(config: RunConfig, ranks: int) -> Preflight:
    """Check a run before torch is imported: half a second to an error instead of half a minute. Writes nothing.

    Args:
        ranks: number of ranks that the run is started on.

    Raises:
        ValueError: the run cannot start; the message names the thing and the cure.
    """
    if ranks > config.train.batch_size:
        raise ConfigError(
            f"{ranks} ranks cannot share a batch of {config.train.batch_size} users: "
            f"start at most {config.train.batch_size} ranks or raise train.batch_size"
        )
    _check_output(config)
    _check_trackers(config.train)
    micro_batches = micro_batch_count(config.train, ranks)
    settings = load_deepspeed_json(config.engine.deepspeed, config.train, micro_batches=micro_batches)
    _check_quantization(config, zero_stage(settings))
    manifest = read_manifest(config.data.path)
    check_sizes(config.data.path, manifest)
    _check_decay(config.train, manifest)
    sources = check_requirements(config, manifest)
    warm_start = find_warm_start(config, sources)
    return Preflight(config, ranks, manifest, sources, micro_batches, warm_start, settings)


def _check_trackers(train: TrainConfig) -> None:
    """Refuse a tracker whose package is not installed."""
    # The folder `wandb` that offline runs leave counts as a package without an origin.
    specs = {name: importlib.util.find_spec(name) for name in train.trackers}
    if missing := [name for name, spec in specs.items() if spec is None or spec.origin is None]:
        raise ConfigError(
            f"train.trackers={missing[0]}: {missing[0]} is not installed: "
            f"pip install 'llm-srec-trainer[{missing[0]}]', or leave it out"
        )


def _check_decay(train: TrainConfig, manifest: Manifest) -> None:
    """Refuse steps with a learning rate of 0."""
    steps = train.epochs * num_steps(manifest.num_train_users, train.batch_size)
    steps = min(steps, train.max_steps or steps)
    if train.decay_steps is not None and train.decay_steps < steps:
        raise ConfigError(
            f"train.decay_steps={train.decay_steps}: the learning rate would be 0 long before the run ends at step "
            f"{steps}: set train.decay_steps={steps}, or fewer train.epochs or train.max_steps"
        )


def _check_quantization(config: RunConfig, stage: int) -> None:
    """Refuse quantization where it saves nothing (ZeRO-3), and fp8 where it has no kernels (Gaudi)."""
    llm = getattr(config.system, "llm", None)
    if llm is None:
        return
    if stage == 3 and (method := quantization_of(Path(llm.path))):
        raise ConfigError(
            f"{llm.path} holds quantized weights ({method}), which ZeRO-3 (engine.deepspeed={config.engine.deepspeed}) "
            "does not shard: use engine.deepspeed=zero2"
        )
    if llm.quantization == "none":
        return
    setting = f"system.llm.quantization={llm.quantization}"
    if stage == 3:
        raise ConfigError(
            f"{setting} saves nothing under ZeRO-3 (engine.deepspeed={config.engine.deepspeed}): "
            f"this trainer keeps all {llm.quantization} weights on every rank; use engine.deepspeed=zero2, or "
            "quantization=none"
        )
    if llm.quantization == "fp8" and _on_hpu():
        raise ConfigError(
            f"{setting} cannot run on Gaudi: torch has no fp8 matrix product there; "
            "use system.llm.quantization=none (bfloat16), and engine.deepspeed=gaudi/zero3 if the LLM does not fit"
        )


def _on_hpu() -> bool:
    """Whether ranks will run on Gaudi; as in DeepSpeed, `DS_ACCELERATOR` overrides what is installed."""
    chosen = os.environ.get("DS_ACCELERATOR")
    return chosen == "hpu" if chosen else importlib.util.find_spec("habana_frameworks") is not None


def _check_output(config: RunConfig) -> None:
    """Check that the run folder can be written, and that checkpoints in it belong to the same run."""
    path = config.output
    # The run folder may not exist yet: check the closest folder above it that does.
    nearest = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not nearest.is_dir():
        raise ConfigError(f"output={path} cannot be a folder, for {nearest} is a file: choose another output")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"output={path}: {nearest} is not writable: choose another output, or change its permissions")
    run = RunFolder(path)
    if not run.steps():
        return
    if config.resume == "never":
        raise ConfigError(f"{path} already holds a run and resume=never: choose another output or set resume=auto")
    try:
        there = run.config()
    except ConfigError:
        return  # reading the checkpoints compares their identity
    if config_hash(there) != config_hash(config):
        changes = ", ".join(_changes(there, config)) or "see its config.yaml"
        raise ConfigError(f"{path} holds a run with different settings ({changes}); {START_OVER}")


def _changes(there: RunConfig, here: RunConfig) -> Iterator[str]:
    """Yield the settings that make the two different runs, such as `train.lr is 0.001 there, 0.0001 here`."""
    old, new = there.model_dump(mode="json"), here.model_dump(mode="json")
    if there.system.name != here.system.name:
        yield f"system.name is {there.system.name} there, {here.system.name} here"
        return
    for keys, value in flatten(new):
        # One key at a time, because settings that may change on resume do not make a different run.
        found = _replaced(old, keys, value)
        if found != value and _is_different_run(old, there):
            yield f"{'.'.join(keys)} is {found} there, {value} here"
        _replaced(old, keys, found)  # undo


def _is_different_run(tree: dict[str, Any], there: RunConfig) -> bool:
    try:
        return config_hash(parse_config(tree, "")) != config_hash(there)
    except ConfigError:  # settings that are valid only together, such as dim and heads
        return True


def _replaced(tree: dict[str, Any], keys: tuple[str, ...], value: Any) -> Any:
    """Set the value at `keys` in place; returns the old one."""
    for key in keys[:-1]:
        tree = tree[key]
    before, tree[keys[-1]] = tree[keys[-1]], value
    return before


@dataclass(frozen=True)
class SavedRun:
    """A trained run on disk that passed the checks."""

    config: RunConfig
    """The run's configuration, with the current location of its folder as `output`."""
    checkpoint: Checkpoint
    """Best checkpoint of the run."""
    manifest: Manifest
    export: ExportFacts | None = None
    """None: a run folder. Otherwise an exported run, whose dataset has items, but no users."""


def check_saved_run(path: Path, data: Path | None = None) -> SavedRun:
    """Check that a run can be evaluated or recommend, before torch is imported.

    Args:
        data: folder of the run's dataset; None: where it was in training.

    Raises:
        ValueError: not a run folder, no validation yet, a damaged checkpoint, or a different dataset than in training.
    """
    if is_export(path):
        raise CheckpointError(f"{path} is an exported run, which holds no users: give the run that it was made from")
    return check_loadable(path, data=data)


def check_loadable(path: Path, llm: str | None = None, data: Path | None = None) -> SavedRun:
    """Check a run folder or an exported run (`trainer/runs/exported.py`), before torch is imported.

    Args:
        llm: folder or hub id of the run's language model or text encoder; None: where it was in training.
        data: folder of the run's dataset; None: where it was in training.

    Raises:
        ValueError: as `check_saved_run`; or a damaged export, or `llm` is not there, or the system has none.
    """
    run = RunFolder(path)
    facts = read_facts(path) if is_export(path) else None
    # The folder may have been moved since the run was trained.
    config = read_config(path) if facts else run.config().model_copy(update={"output": path})
    config = config if llm is None else with_base_model(config, llm)
    if facts and facts.base_model:
        _check_base_model(config, facts.base_model)
    if data is not None and facts is None:
        config = config.model_copy(update={"data": config.data.model_copy(update={"path": data})})
    checkpoint = run.best()
    try:
        manifest = read_manifest(config.data.path)
    except DatasetError as error:
        if data is not None or facts is not None:
            raise
        raise DatasetError(f"{error}; or, if the dataset of {path} has moved, say where it is: --data DIR") from None
    if manifest.fingerprint != checkpoint.identity.dataset_fingerprint:
        raise CheckpointError(
            f"{path} was trained on a different dataset than {config.data.path} holds now: rebuild the original dataset"
        )
    if facts is None:
        check_sizes(config.data.path, manifest)
    return SavedRun(config, checkpoint, manifest, facts)


def _check_base_model(config: RunConfig, model: BaseModel) -> None:
    """Check that the language model or text encoder of an export is there; loading checks that it is the same."""
    path: str = getattr(config.system, model.key).path
    if not Path(path).is_dir() and not may_be_hub_id(path):
        raise ConfigError(
            f"{config.output} needs the language model or text encoder that it was trained with, and {path} is not "
            f"there: give its folder with --llm (fingerprint {model.fingerprint})"
        )
