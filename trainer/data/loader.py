"""Training batches of one rank: the micro-batches of each step of an epoch."""

from __future__ import annotations

import signal
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, count, islice
from typing import Generic, TypeVar

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from trainer.config import TrainingOrder
from trainer.data.collators.base import TrainingCollator, pin_memory
from trainer.data.curriculum import Curriculum
from trainer.data.prefetch import Prefetched
from trainer.data.reading.counter_rng import IntArray
from trainer.data.reading.dataset import Dataset
from trainer.data.reading.shards import epoch_batches
from trainer.runs.batch_shares import num_steps, share

BatchT = TypeVar("BatchT")

_AHEAD = 2
"""Steps that the prefetching thread keeps ready: the second covers a step that takes longer to build, such as the first
of a window of shards."""


@dataclass(frozen=True)
class StepBatches(Generic[BatchT]):
    """One optimizer step of one rank."""

    user_U: IntArray
    """User indices of the whole global batch, in sample order."""
    micro_batches: tuple[BatchT, ...]
    """This rank's share; a micro-batch may be empty, because all ranks run the same number of forward passes."""
    own_users: int
    """Number of users in this rank's share."""
    easy: bool = False
    """Whether the curriculum, if any, chose its easy prompts for this step."""


@dataclass(frozen=True)
class StepLoader(Generic[BatchT]):
    """Builds the batches of one rank; picklable, because loader processes hold a copy."""

    dataset: Dataset
    collator: TrainingCollator[BatchT]
    batch_size: int
    """Users per global batch."""
    micro_batches: int
    """Forward passes per step, the same on every rank."""
    shuffle_shards: int
    """Shards per shuffle window (`trainer.data.reading.sample_order`)."""
    seed: int
    workers: int
    """Loader processes; 0: a thread of this process builds the batches."""
    rank: int
    world_size: int
    curriculum: Curriculum[BatchT] | None = None
    training_order: TrainingOrder = "original"
    """Order of the items of each training sequence (`data.training_order`)."""
    pinned: bool = False
    """Whether the thread copies batches to page-locked memory (`pin_memory`)."""

    def steps(self, first: int, total: int) -> Generator[StepBatches[BatchT], None, None]:
        """Yield steps `first` to `total` - 1 of the run, counted from 0; every rank gets the same number of steps.

        Without loader processes a thread builds the next steps, also those of the next epoch, while the caller works on
        the current one. It ends when the generator is exhausted or closed.
        """
        steps = self._steps(first, total)
        if self.workers:  # the processes work ahead, too
            yield from steps
            return
        with closing(Prefetched(map(pin_memory, steps) if self.pinned else steps, _AHEAD)) as ready:
            yield from ready

    def _steps(self, first: int, total: int) -> Iterator[StepBatches[BatchT]]:
        epoch, first_of_epoch = divmod(first, num_steps(self.dataset.manifest.num_train_users, self.batch_size))
        later = (self.epoch(number) for number in count(epoch + 1))
        return islice(chain(self.epoch(epoch, first_of_epoch), chain.from_iterable(later)), total - first)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[StepBatches[BatchT]]:
        """Yield the epoch's steps from `first_step` on, each built when it is asked for or by loader processes."""
        if not self.workers:
            yield from _EpochSteps(self, epoch, first_step)
            return
        yield from DataLoader(
            _EpochSteps(self, epoch, first_step),
            batch_size=None,  # the collator builds whole batches
            num_workers=self.workers,
            worker_init_fn=_ignore_stop_signals,
            multiprocessing_context="spawn",  # forking a process with OpenMP and collective threads can deadlock
        )

    def at(self, step: int) -> tuple[TrainingCollator[BatchT], bool]:
        """Collator for step `step` of the run, counted from 0, and whether it is the curriculum's easy one."""
        if self.curriculum is None or not self.curriculum.is_easy(step):
            return self.collator, False
        return self.curriculum.easy, True


def _ignore_stop_signals(worker: int) -> None:
    """Ignore stop signals: Slurm signals every process of a job step, but loaders must work until their rank ends."""
    for stop_signal in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(stop_signal, signal.SIG_IGN)


class _EpochSteps(IterableDataset[StepBatches[BatchT]]):
    """Steps of one epoch; with n loader processes, each builds every n-th step."""

    def __init__(self, loader: StepLoader[BatchT], epoch: int, first_step: int) -> None:
        self._loader = loader
        self._epoch = epoch
        self._first_step = first_step

    def __iter__(self) -> Iterator[StepBatches[BatchT]]:
        loader = self._loader
        worker = get_worker_info()
        if worker is not None:
            torch.set_num_threads(1)  # processes already run in parallel: do not oversubscribe the CPU
        worker_id, num_workers = (worker.id, worker.num_workers) if worker else (0, 1)
        # Each process reads the whole epoch and builds its own steps only: sample order does not depend on `workers`.
        batches = epoch_batches(
            loader.dataset.path,
            loader.dataset.manifest,
            batch_size=loader.batch_size,
            shuffle_shards=loader.shuffle_shards,
            seed=loader.seed,
            epoch=self._epoch,
            first_step=self._first_step,
        )
        steps_per_epoch = num_steps(loader.dataset.manifest.num_train_users, loader.batch_size)
        first_run_step = self._epoch * steps_per_epoch + self._first_step
        for index, users in enumerate(batches):
            if index % num_workers == worker_id:  # DataLoader polls its workers in turn, so steps come back in order
                users = users.dated(loader.dataset.repeat_dates)
                users = users.in_training_order(loader.training_order, loader.collator.max_history, loader.seed)
                own = share(len(users), loader.rank, loader.world_size)
                parts = [share(own.stop - own.start, i, loader.micro_batches) for i in range(loader.micro_batches)]
                slices = [slice(own.start + part.start, own.start + part.stop) for part in parts]
                collator, easy = loader.at(first_run_step + index)
                micro_batches = tuple(collator.train(users, rows, self._epoch) for rows in slices)
                yield StepBatches(users.train.user_U, micro_batches, own.stop - own.start, easy)
