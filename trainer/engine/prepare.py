"""Everything between a checked configuration and the first step."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from trainer.config import ConfigError, RunConfig, config_hash, dump_config
from trainer.config.runs import Checkpoint, CheckpointError, Identity, Progress, RunFolder
from trainer.data.catalog import Dataset, open_dataset
from trainer.data.loader import Feed
from trainer.data.plan import share_sizes
from trainer.device import World
from trainer.engine.build import Engine
from trainer.engine.checkpoint import restore_moments, write_atomically
from trainer.engine.deepspeed_json import load_deepspeed_json
from trainer.models import System, build_system, load_weights

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
    if world.size > config.train.batch_size:
        raise ConfigError(
            f"{world.size} ranks cannot share a batch of {config.train.batch_size} users: "
            f"start at most {config.train.batch_size} ranks or raise train.batch_size"
        )
    run = RunFolder(config.output)
    checkpoint = run.newest()
    if checkpoint and config.resume == "never":
        raise ConfigError(f"{run.path} already holds a run and resume=never: choose another output or set resume=auto")
    micro_batches = _micro_batches(config, world)
    settings = load_deepspeed_json(config.engine.deepspeed, config.train, micro_batches=micro_batches)
    # One rank reads every byte; the others see the same files.
    dataset = open_dataset(config.data.path, full_check=config.data.verify and world.is_main)
    system = build_system(config, dataset)
    identity = Identity(
        system=config.system.name,
        config_hash=config_hash(config),
        dataset_fingerprint=dataset.manifest.fingerprint,
        catalog_sha256=dataset.manifest.catalog_sha256,
        llm=system.llm,
        teacher=system.teacher,
    )
    if checkpoint:
        _check_identity(run, checkpoint, identity)
        load_weights(system.model, checkpoint)
    engine = Engine(system.model, config.train, settings, world)
    if checkpoint:
        restore_moments(engine, checkpoint)
    if world.is_main:
        run.path.mkdir(parents=True, exist_ok=True)
        write_atomically(run.path / "config.yaml", dump_config(config))
    world.barrier()
    return Job(
        run, dataset, system, engine, _feed(config, dataset, system, micro_batches, world),
        checkpoint.progress if checkpoint else Progress(), identity,
    )  # fmt: skip


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
    )


def _micro_batches(config: RunConfig, world: World) -> int:
    largest = max(share_sizes(config.train.batch_size, world.size))
    return -(-largest // (config.train.micro_batch_size or largest))


def _check_identity(run: RunFolder, checkpoint: Checkpoint, identity: Identity) -> None:
    found = checkpoint.identity
    cure = "choose another output, or remove the folder to start over"
    if found.dataset_fingerprint != identity.dataset_fingerprint:
        raise CheckpointError(f"{run.path} was trained on another dataset; {cure}")
    if (found.llm, found.teacher) != (identity.llm, identity.teacher):
        what = "LLM" if found.llm != identity.llm else "teacher"
        raise CheckpointError(f"{run.path} was trained with another {what} than is there now; {cure}")
    if found != identity:
        raise CheckpointError(
            f"{run.path} holds a run with other settings (compare {run.path / 'config.yaml'} with yours); {cure}"
        )
