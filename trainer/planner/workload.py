"""Tokens in the steps and validations of a run, from its real shards, catalog and tokenizer."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from statistics import median
from typing import Self

import numpy as np

from trainer.config import RunConfig
from trainer.data.collators.generation import TitleChoices, TitleCollator, TitleTraining
from trainer.data.collators.retrieval import ItemPrompts, RetrievalCollator, RetrievalTraining, UserPrompts
from trainer.data.prompts.packing import PackedPrompts, Segments, Stream
from trainer.data.reading.counter_rng import IntArray, permutation
from trainer.data.reading.dataset import Dataset
from trainer.data.reading.histories import Histories, Users
from trainer.data.reading.shards import epoch_batches, read_validated
from trainer.models.llm.generation import LOGITS_AT_ONCE
from trainer.planner.costs import Load
from trainer.runs.batch_shares import share, share_sizes

_SAMPLED_STEPS = 8
_SAMPLED_BATCHES = 4


@dataclass(frozen=True)
class LossSizes:
    """Sizes of the loss of a global batch, which every rank computes from the terms of all."""

    targets: int
    """Targets per user, padding included."""
    items: int
    """Distinct items that all targets are scored against (`train_candidates=batch`); 0: each has its own candidates."""

    @classmethod
    def of(cls, batch: RetrievalTraining | TitleTraining) -> Self:
        """The sizes that a rank's share of the batch tells."""
        if isinstance(batch, TitleTraining):
            return cls(0, 0)
        return cls(batch.targets, batch.batch_items.excluded_BM.shape[1] if batch.batch_items else 0)


@dataclass(frozen=True)
class Workload:
    """A sample of a run's batches."""

    config: RunConfig
    dataset: Dataset
    collator: RetrievalCollator | TitleCollator
    batches: Sequence[Users]
    """Global batches of the first epoch."""
    varlen: bool = False
    """See `Load.varlen`."""

    @classmethod
    def sample(
        cls,
        config: RunConfig,
        dataset: Dataset,
        collator: RetrievalCollator | TitleCollator,
        *,
        varlen: bool = False,
    ) -> Workload:
        """Sample the first steps of the run that have a full batch, or those that there are if none has."""
        steps = epoch_batches(
            dataset.path,
            dataset.manifest,
            batch_size=config.train.batch_size,
            shuffle_shards=config.data.shuffle_shards,
            seed=config.seed,
            epoch=0,
        )
        first = list(islice(steps, _SAMPLED_STEPS))
        full = [users for users in first if len(users) == config.train.batch_size]
        return cls(config, dataset, collator, full or first, varlen)

    def training(self, micro_batches: int, ranks: int) -> list[list[Load]]:
        """For each sampled step, the micro-batches of the rank with the largest share."""
        return [
            [load_of(batch, varlen=self.varlen) for batch in self._collated(users, micro_batches, ranks)]
            for users in self.batches
        ]

    def collation_seconds(self, micro_batches: int, ranks: int) -> float:
        """Median time that this machine takes to build the same batches of a step, in one thread."""
        seconds = []
        for users in self.batches:
            start = time.perf_counter()
            deque(self._collated(users, micro_batches, ranks), maxlen=0)
            seconds.append(time.perf_counter() - start)
        return median(seconds)

    def loss_sizes(self, ranks: int) -> LossSizes:
        """Targets and items of the loss, the largest of the sampled steps; zeros for title generation."""
        sizes = [LossSizes.of(batch) for users in self.batches for batch in self._collated(users, 1, ranks)]
        return LossSizes(max(size.targets for size in sizes), max(size.items for size in sizes))

    def _collated(self, users: Users, micro_batches: int, ranks: int) -> Iterator[RetrievalTraining | TitleTraining]:
        rank = int(np.argmax(share_sizes(self.config.train.batch_size, ranks)))
        own = share(len(users), rank, ranks)
        for part in (share(own.stop - own.start, part, micro_batches) for part in range(micro_batches)):
            yield self.collator.train(users, slice(own.start + part.start, own.start + part.stop), 0)

    def validation(self) -> list[tuple[Load, float]]:
        """Sampled batches of one validation (items, then evaluated users), each with the number that it stands for."""
        size, evaluation = self.config.evaluation.batch_size, self.config.evaluation
        found, target_U = read_validated(self.dataset.path, self.dataset.manifest).targets("valid")
        users, target_U = found.take(slice(0, size * _SAMPLED_BATCHES)), target_U[: size * _SAMPLED_BATCHES]
        total = self.dataset.manifest.statistics.users_with_valid
        evaluated = min(total, evaluation.valid_users or evaluation.users or total)
        batches = [slice(first, first + size) for first in range(0, len(users), size)]
        user_loads = [self._user_load(users.take(batch), target_U[batch]) for batch in batches]
        return [*self._item_loads(size), *((load, evaluated / len(users)) for load in user_loads)]

    def _item_loads(self, size: int) -> list[tuple[Load, float]]:
        """Sampled batches of items, each with the number that it stands for; empty if items are not encoded."""
        if isinstance(self.collator, TitleCollator):
            return []
        items = 1 + permutation(self.dataset.num_items, 0)[: size * _SAMPLED_BATCHES]
        batches = [self.collator.items(items[first : first + size]) for first in range(0, len(items), size)]
        loads = [load_of(batch, varlen=self.varlen) for batch in batches]
        return [(load, self.dataset.num_items / len(items)) for load in loads]

    def _user_load(self, histories: Histories, target_B: IntArray) -> Load:
        """Load of a batch of evaluated users."""
        if isinstance(self.collator, TitleCollator):
            negative_BC = self.dataset.candidates_of("title", "valid", histories.user_U)
            choices = self.collator.choices(histories, np.concatenate([target_B[:, None], negative_BC], axis=1))
            return load_of(choices, varlen=self.varlen)
        return load_of(self.collator.histories(histories), varlen=self.varlen)


def load_of(
    batch: RetrievalTraining | UserPrompts | ItemPrompts | TitleTraining | TitleChoices, *, varlen: bool = False
) -> Load:
    """The LLM's work on a batch, logits included."""
    load = load_of_prompts(batch.prompts, varlen=varlen)
    if not isinstance(batch, TitleTraining | TitleChoices):
        return load
    logits = batch.answers.token_A.numel()
    return replace(load, logits=logits, logits_at_once=min(logits, LOGITS_AT_ONCE))


def load_of_prompts(prompts: PackedPrompts, *, varlen: bool = False) -> Load:
    """The decoder's work on a packed batch.

    Args:
        varlen: attention runs in a variable-length kernel rather than in groups.
    """
    frozen, trained = prompts.frozen, prompts.trained
    return Load(
        useful=prompts.useful_tokens,
        frozen=frozen.token_T.numel() if frozen else 0,
        trained=trained.token_T.numel(),
        frozen_pairs=_pairs(frozen, varlen) if frozen else 0,
        trained_pairs=_pairs(trained, varlen),
        queries=trained.token_T.numel() if varlen else sum(group.query_GQ.numel() for group in trained.groups),
        keys=_segments(trained).key_J.numel() if varlen else sum(group.key_GK.numel() for group in trained.groups),
        readouts=prompts.readout_R.numel(),
        cached=len(prompts.cached_M),
        varlen=varlen,
    )


def _pairs(stream: Stream, varlen: bool) -> int:
    if not varlen:
        return sum(group.query_GQ.numel() * group.key_GK.shape[1] for group in stream.groups)
    segments = _segments(stream)
    queries, keys = (lengths.diff().long() for lengths in (segments.cu_query_E, segments.cu_key_E))
    return int((queries * (keys - queries) + queries * (queries + 1) // 2).sum())  # a segment's last keys are its own


def _segments(stream: Stream) -> Segments:
    assert stream.segments is not None, "no kernel of variable lengths runs padded rows"
    return stream.segments
