"""Everything between a checked configuration and the first step."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from trainer.config import ConfigError, RunConfig, config_hash, dump_config, with_absolute_paths
from trainer.config.deepspeed_json import load_deepspeed_json
from trainer.data.loader import Feed
from trainer.data.reading.dataset import Dataset, open_dataset
from trainer.distributed import World
from trainer.engine.checkpoint import create_partitioned_state, restore_moments
from trainer.engine.engine import Engine
from trainer.models import System, build_system, changed_part, load_weights
from trainer.runs.atomic import write_atomically
from trainer.runs.folder import Checkpoint, CheckpointError, Identity, Progress, RunFolder
from trainer.runs.preflight import START_OVER, check_door, micro_batches

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """A run that is ready to train."""

    run: RunFolder
    dataset: Dataset
    system: System
    engine: Engine
    feed: Feed
    progress: Progress
    identity: Identity


def prepare(config: RunConfig, world: World) -> Job:
    """Open the data, build the model, go on from the newest checkpoint where there is one.

    Raises:
        ValueError: the run cannot be; the message names the thing and the cure. Nothing was written yet.
    """
    try:
        opened = _open(config, world)
    except (ValueError, OSError) as error:
        _all_or_none(world, str(error))
        raise
    _all_or_none(world, None)
    dataset, system, identity, checkpoint = opened
    run = RunFolder(config.output)
    if system.initialize and not checkpoint:
        system.initialize(world.device)
    passes = micro_batches(config, world.size)
    settings = load_deepspeed_json(config.engine.deepspeed, config.train, micro_batches=passes)
    resting = system.curriculum.resting if system.curriculum else ""
    try:
        engine = Engine(system.model, config.train, settings, world, resting=resting)
    except ValueError as error:
        raise ConfigError(f"DeepSpeed refuses engine.deepspeed={config.engine.deepspeed}: {error}") from error
    if checkpoint:
        restore_moments(engine, checkpoint)
    elif resting and engine.zero_stage:
        create_partitioned_state(engine, torch.zeros(()))
    if world.is_main:
        run.path.mkdir(parents=True, exist_ok=True)
        write_atomically(run.path / "config.yaml", dump_config(with_absolute_paths(config)))
    world.barrier()
    return Job(
        run, dataset, system, engine, _feed(config, dataset, system, passes, world),
        checkpoint.progress if checkpoint else Progress(), identity,
    )  # fmt: skip


def _open(config: RunConfig, world: World) -> tuple[Dataset, System, Identity, Checkpoint | None]:
    check_door(config, world.size)
    run = RunFolder(config.output)
    checkpoint = run.newest()
    # One rank reads every byte; the others see the same files.
    dataset = open_dataset(config.data.path, full_check=config.data.verify and world.is_main)
    if checkpoint and checkpoint.identity.dataset_fingerprint != dataset.manifest.fingerprint:
        raise CheckpointError(f"{run.path} was trained on another dataset than {dataset.path} holds now; {START_OVER}")
    system = build_system(config, dataset)
    identity = Identity(
        system=config.system.name,
        config_hash=config_hash(config),
        dataset_fingerprint=dataset.manifest.fingerprint,
        catalog_sha256=dataset.manifest.catalog_sha256,
        llm=system.llm,
        built_on=dict(system.built_on),
    )
    if checkpoint:
        _check_identity(run, checkpoint, identity, system)
        load_weights(system.model, checkpoint)
    return dataset, system, identity, checkpoint


def _all_or_none(world: World, problem: str | None) -> None:
    """Stop on every rank if there is a problem on one: the others would wait for it in the engine."""
    if world.size == 1:
        return
    problems: list[str | None] = [None] * world.size
    torch.distributed.all_gather_object(problems, problem)
    for rank, found in enumerate(problems):
        if found is not None:
            raise ConfigError(found if rank == 0 else f"on rank {rank}: {found}")


def _feed(config: RunConfig, dataset: Dataset, system: System, micro_batches: int, world: World) -> Feed:
    return Feed(
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
    )


def _check_identity(run: RunFolder, checkpoint: Checkpoint, identity: Identity, system: System) -> None:
    found = checkpoint.identity
    if other := changed_part(found, system):
        raise CheckpointError(f"{run.path} was trained with another {other} than is there now; {START_OVER}")
    if found != identity:
        raise CheckpointError(
            f"{run.path} holds a run with other settings (compare {run.path / 'config.yaml'} with yours); {START_OVER}"
        )
