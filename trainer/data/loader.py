"""From the plan to batches: what a rank runs in each step of an epoch."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from trainer.data.collators.base import TrainingCollator
from trainer.data.curriculum import Curriculum
from trainer.data.reading.counter_rng import IntArray
from trainer.data.reading.dataset import Dataset
from trainer.data.reading.shards import epoch_batches
from trainer.runs.batch_shares import num_steps, share

BatchT = TypeVar("BatchT")


@dataclass(frozen=True)
class StepBatches(Generic[BatchT]):
    """One step of one rank."""

    user_U: IntArray
    """Users of the whole global batch, in order."""
    micro_batches: tuple[BatchT, ...]
    own_users: int
    """Users of this rank's share."""
    easy: bool = False
    """Whether the curriculum, where there is one, chose its easy prompts."""


@dataclass(frozen=True)
class StepLoader(Generic[BatchT]):
    """Makes a rank's batches; picklable, so that loader processes can hold it."""

    dataset: Dataset
    collator: TrainingCollator[BatchT]
    batch_size: int
    micro_batches: int
    shuffle_shards: int
    seed: int
    workers: int
    rank: int
    world_size: int
    curriculum: Curriculum[BatchT] | None = None

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[StepBatches[BatchT]]:
        """The epoch's steps from `first_step` on, the same number on every rank."""
        if not self.workers:
            yield from _EpochSteps(self, epoch, first_step)
            return
        yield from DataLoader(
            _EpochSteps(self, epoch, first_step),
            batch_size=None,
            num_workers=self.workers,
            worker_init_fn=_ignore_stop_signals,
            multiprocessing_context="spawn",  # forking a process with OpenMP and collective threads can deadlock
        )

    def at(self, step: int) -> tuple[TrainingCollator[BatchT], bool]:
        """What makes the batches of a step of the run, and whether they are the curriculum's easy ones."""
        if self.curriculum is None or not self.curriculum.is_easy(step):
            return self.collator, False
        return self.curriculum.easy, True


def _ignore_stop_signals(worker: int) -> None:
    """Slurm signals every process of a step; these are to work on until their rank ends."""
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class _EpochSteps(IterableDataset[StepBatches[BatchT]]):
    def __init__(self, feed: StepLoader[BatchT], epoch: int, first_step: int) -> None:
        self._feed = feed
        self._epoch = epoch
        self._first_step = first_step

    def __iter__(self) -> Iterator[StepBatches[BatchT]]:
        feed = self._feed
        worker = get_worker_info()
        if worker is not None:
            torch.set_num_threads(1)
        mine, of = (worker.id, worker.num_workers) if worker else (0, 1)
        batches = epoch_batches(
            feed.dataset.path,
            feed.dataset.manifest,
            batch_size=feed.batch_size,
            shuffle_shards=feed.shuffle_shards,
            seed=feed.seed,
            epoch=self._epoch,
            first_step=self._first_step,
        )
        steps_per_epoch = num_steps(feed.dataset.manifest.num_users, feed.batch_size)
        begin = self._epoch * steps_per_epoch + self._first_step
        for number, users in enumerate(batches):
            if number % of == mine:  # DataLoader takes from its workers in turn, so steps come back in order
                own = share(len(users), feed.rank, feed.world_size)
                parts = [share(own.stop - own.start, part, feed.micro_batches) for part in range(feed.micro_batches)]
                slices = [slice(own.start + part.start, own.start + part.stop) for part in parts]
                collator, easy = feed.at(begin + number)
                micro_batches = tuple(collator.train(users, rows, self._epoch) for rows in slices)
                yield StepBatches(users.train.user_U, micro_batches, own.stop - own.start, easy)
