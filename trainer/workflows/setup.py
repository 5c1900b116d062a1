"""Set up a run: everything between a checked configuration and the first step."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch

from trainer.config import ConfigError, RunConfig, config_hash
from trainer.data.loader import StepLoader
from trainer.data.reading.dataset import Dataset, open_dataset
from trainer.device import pins_memory
from trainer.distributed import World
from trainer.engine.checkpoint import create_partitioned_state, restore_moments
from trainer.engine.engine import Engine
from trainer.engine.sharding import streamed
from trainer.models import AnySystem, build_system, changed_dependency, load_weights
from trainer.models.warm_start import CarriedOver, carry_over
from trainer.runs.atomic import write_atomically
from trainer.runs.folder import Checkpoint, CheckpointError, Identity, Progress, RunFolder
from trainer.runs.preflight import START_OVER, Preflight


@dataclass(frozen=True)
class TrainingSetup:
    """A run that is ready to train."""

    config: RunConfig
    run: RunFolder
    dataset: Dataset
    system: AnySystem
    engine: Engine[Any, Any]
    loader: StepLoader[Any]
    progress: Progress
    """Progress that training starts from: that of the newest checkpoint, or zero."""
    identity: Identity
    carried: CarriedOver | None
    """What was just taken from the run of `train.init_from`; None if nothing was."""


def set_up(checked: Preflight, world: World) -> TrainingSetup:
    """Open the data, build the model and load the newest checkpoint if one exists.

    Raises:
        ValueError: the run cannot start; the message names the thing and the cure. Nothing has been written yet.
    """
    config = checked.config
    if checked.ranks != world.size:
        raise ConfigError(
            f"the preflight was for {checked.ranks} rank(s), but {world.size} run: call it with their number"
        )
    try:
        opened = _open(checked, world)
    except (ValueError, OSError) as error:
        raise_on_all_ranks(world, str(error))
        raise
    raise_on_all_ranks(world, None)
    dataset, system, identity, checkpoint, carried = opened
    run = RunFolder(config.output)
    if system.initialize and not checkpoint and not carried:
        with _placed(system, checked, world.device):
            system.initialize(world.device)
    fixed_prefix = system.curriculum.fixed_prefix if system.curriculum else ""
    try:
        engine = Engine(system.model, config.train, checked.deepspeed, world, fixed_prefix=fixed_prefix)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"DeepSpeed rejects engine.deepspeed={config.engine.deepspeed}: {error}") from error
    if checkpoint:
        restore_moments(engine, checkpoint)
    elif fixed_prefix and engine.zero_stage:  # two parameter groups: see `create_partitioned_state`
        create_partitioned_state(engine, torch.zeros(()))
    if world.is_main:
        run.write_config(config)
        if carried:
            write_atomically(run.warm_start, json.dumps(asdict(carried), indent=1) + "\n")
    world.barrier()
    loader = _step_loader(config, dataset, system, checked.micro_batches, world)
    progress = checkpoint.progress if checkpoint else Progress()
    return TrainingSetup(config, run, dataset, system, engine, loader, progress, identity, carried)


def _placed(system: AnySystem, checked: Preflight, device: torch.device) -> AbstractContextManager[None]:
    """The model on the device; under ZeRO-3 it may not fit there, so that only what runs is."""
    if checked.zero_stage == 3:
        return streamed(system.model, device)
    system.model.to(device)
    return nullcontext()


def _open(
    checked: Preflight, world: World
) -> tuple[Dataset, AnySystem, Identity, Checkpoint | None, CarriedOver | None]:
    config, manifest = checked.config, checked.manifest
    run = RunFolder(config.output)
    checkpoint = run.newest()
    # Only one rank verifies every byte: all ranks see the same files.
    dataset = open_dataset(config.data.path, full_check=config.data.verify and world.is_main, manifest=manifest)
    if checkpoint and checkpoint.identity.dataset_fingerprint != manifest.fingerprint:
        raise CheckpointError(
            f"{run.path} was trained on a different dataset than {dataset.path} holds now; {START_OVER}"
        )
    system = build_system(config, dataset, checked.sources)
    warm = checked.warm_start
    started_from = checkpoint.identity.init_from if checkpoint else warm.checkpoint.weights_sha256 if warm else ""
    identity = Identity(
        system=config.system.name,
        config_hash=config_hash(config),
        dataset_fingerprint=manifest.fingerprint,
        catalog_sha256=manifest.catalog_sha256,
        llm=system.llm,
        built_on=dict(system.built_on),
        init_from=started_from,
    )
    if checkpoint:
        _check_identity(run, checkpoint, identity, system)
        load_weights(system.model, checkpoint)
    carried = carry_over(warm, system, dataset) if warm and not checkpoint else None
    return dataset, system, identity, checkpoint, carried


def raise_on_all_ranks(world: World, problem: str | None) -> None:
    """Raise on every rank if any rank has a problem: the other ranks would wait for it in the engine."""
    if world.size == 1:
        return
    problems: list[str | None] = [None] * world.size
    with world.heartbeat.collective():
        torch.distributed.all_gather_object(problems, problem)
    for rank, found in enumerate(problems):
        if found is not None:
            raise ConfigError(found if rank == 0 else f"on rank {rank}: {found}")


def _step_loader(
    config: RunConfig, dataset: Dataset, system: AnySystem, micro_batches: int, world: World
) -> StepLoader[Any]:
    return StepLoader(
        dataset=dataset,
        collator=system.collator,
        batch_size=config.train.batch_size,
        micro_batches=micro_batches,
        shuffle_shards=config.data.shuffle_shards,
        seed=config.seed,
        workers=config.data.workers,
        rank=world.rank,
        world_size=world.size,
        curriculum=system.curriculum,
        training_order=config.data.training_order,
        pinned=pins_memory(),
    )


def _check_identity(run: RunFolder, checkpoint: Checkpoint, identity: Identity, system: AnySystem) -> None:
    found = checkpoint.identity
    if other := changed_dependency(found, system):
        raise CheckpointError(f"{run.path} was trained with a different {other} than the current one; {START_OVER}")
    if found != identity:
        raise CheckpointError(
            f"{run.path} holds a run with different settings (compare its config.yaml with yours); {START_OVER}"
        )
