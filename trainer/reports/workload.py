"""How many tokens the steps and validations of a run have, from its real shards, catalog and tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from trainer.config import RunConfig
from trainer.data.catalog import Dataset
from trainer.data.packing import PackedPrompts, Stream
from trainer.data.plan import share, share_sizes
from trainer.data.prompt_batches import RetrievalCollator
from trainer.data.randomness import permutation
from trainer.data.stream import epoch_batches, read_shards
from trainer.data.users import Users
from trainer.reports.costs import Load

_SAMPLED_STEPS = 8
_SAMPLED_BATCHES = 4


@dataclass(frozen=True)
class Workload:
    """A run's batches, sampled."""

    config: RunConfig
    dataset: Dataset
    collator: RetrievalCollator
    batches: Sequence[Users]
    """Global batches of the first epoch."""

    @classmethod
    def sample(cls, config: RunConfig, dataset: Dataset, collator: RetrievalCollator) -> Workload:
        """The first steps of the run that are full."""
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
        return cls(config, dataset, collator, full or first)

    def training(self, micro_batches: int, ranks: int) -> list[list[Load]]:
        """For each sampled step, the micro-batches of the rank with the largest share."""
        rank = int(np.argmax(share_sizes(self.config.train.batch_size, ranks)))
        steps = []
        for users in self.batches:
            own = share(len(users), rank, ranks)
            parts = [share(own.stop - own.start, part, micro_batches) for part in range(micro_batches)]
            rows = [slice(own.start + part.start, own.start + part.stop) for part in parts]
            steps.append([load_of(self.collator.train(users, part, 0).prompts) for part in rows])
        return steps

    def validation(self) -> list[tuple[Load, float]]:
        """Batches of one validation (every item, then every user that is evaluated) and how many each stands for."""
        size, evaluation = self.config.evaluation.batch_size, self.config.evaluation
        items = 1 + permutation(self.dataset.num_items, 0)[: size * _SAMPLED_BATCHES]
        of_items = [load_of(self.collator.items(items[at : at + size]).prompts) for at in range(0, len(items), size)]
        found = read_shards(self.dataset.path, self.dataset.manifest, [0]).train
        users = found.take(slice(0, size * _SAMPLED_BATCHES))
        batches = [users.take(slice(at, at + size)) for at in range(0, len(users), size)]
        of_users = [load_of(self.collator.histories(batch).prompts) for batch in batches]
        total = self.dataset.manifest.num_users
        evaluated = min(total, evaluation.valid_users or evaluation.users or total)
        item_weight, user_weight = self.dataset.num_items / len(items), evaluated / len(users)
        return [(load, item_weight) for load in of_items] + [(load, user_weight) for load in of_users]


def load_of(prompts: PackedPrompts) -> Load:
    """What a packed batch asks of the decoder."""
    frozen = prompts.frozen
    return Load(
        useful=prompts.useful_tokens,
        frozen=frozen.token_N.numel() if frozen else 0,
        trained=prompts.trained.token_N.numel(),
        frozen_pairs=_pairs(frozen) if frozen else 0,
        trained_pairs=_pairs(prompts.trained),
        queries=sum(group.query_GQ.numel() for group in prompts.trained.groups),
        keys=sum(group.key_GK.numel() for group in prompts.trained.groups),
        readouts=prompts.readout_P.numel(),
        stored=len(prompts.stored_M),
    )


def _pairs(stream: Stream) -> int:
    return sum(group.query_GQ.numel() * group.key_GK.shape[1] for group in stream.groups)
