"""The one way every system is ranked: same users, same stored candidates, same treatment of ties.

Users and items are shared among ranks, and each is encoded exactly once. Of several splits a user's histories are
encoded in one batch, where a collator can let prompts that extend each other share their beginning.

Letters: U users, N items of the catalog, D width of the vectors, R histories of all splits, B those of a batch,
C negatives.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, assert_never

import numpy as np
import torch

from trainer.config import EvaluationConfig, HistoryOrder, Split, Task
from trainer.data.reading.counter_rng import IntArray, permutation
from trainer.data.reading.dataset import Dataset
from trainer.data.reading.histories import Histories, Users
from trainer.data.reading.shards import read_in_order
from trainer.distributed import World
from trainer.evaluation.rankers import (
    SPLITS,
    Batches,
    HeldOut,
    Ranked,
    Ranker,
    StoredCandidates,
    TitleRanker,
    VectorRanker,
)
from trainer.evaluation.ranking import Estimate, Floats, Ranks, bootstrap_all, per_user_metrics
from trainer.models.scoring import TitleScoring, VectorScoring
from trainer.models.system import EpochItems
from trainer.runs.batch_shares import share, share_sizes

GREEDY_METRICS = ("HR@1 (greedy)", "valid (greedy)")
"""The answer that greedy decoding writes is the target's title; it is the title of a candidate."""


@dataclass(frozen=True)
class Evaluation:
    """Where every evaluated user's target stands."""

    ranks: Ranks
    seconds: float
    """Of splits that were evaluated together, each has the share of its users."""
    tokens: int
    """LLM tokens run for users, over all ranks (0 for systems without an LLM), shared likewise."""
    decoded: Mapping[str, IntArray] = field(default_factory=dict)
    """`GREEDY_METRICS` of each user, 0 or 1, where answers were decoded."""

    def means(self, config: EvaluationConfig) -> dict[str, float]:
        """Each metric's mean over users."""
        return {name: float(value_U.mean()) for name, value_U in self._metrics(config).items()}

    def estimates(self, config: EvaluationConfig) -> dict[str, Estimate]:
        """Each metric with its 95 % bootstrap interval over users."""
        return bootstrap_all(self._metrics(config), seed=config.seed)

    def _metrics(self, config: EvaluationConfig) -> dict[str, Floats]:
        found = per_user_metrics(self.ranks, tie=config.tie)
        return found | {name: value_U.astype(np.float64) for name, value_U in self.decoded.items()}


@dataclass(frozen=True)
class Evaluator:
    """Ranks a system on a dataset; every rank of the run calls its methods together."""

    dataset: Dataset
    scoring: VectorScoring[Any, Any] | TitleScoring
    config: EvaluationConfig
    world: World
    task: Task = "retrieval"
    """Whose stored candidates are ranked."""
    between: Callable[[], None] = lambda: None
    """Called between batches, as often on every rank; what it raises ends the evaluation."""

    def at_current_weights(self, *, decode: bool = False) -> Ranking:
        """Rankings by the weights that the model has now; what all users share (item vectors) is encoded here, once.

        Args:
            decode: also write answers greedily and judge them, where the system answers in titles.
        """
        candidates = StoredCandidates(self.dataset, self.task)
        match self.scoring:
            case VectorScoring() as scoring:
                item_ND = self.batches.encode_catalog(self.dataset.num_items, scoring.item_vectors)
                full = self.config.candidates == "full"
                return Ranking(self, VectorRanker(scoring, candidates, full, self.world.device, item_ND))
            case TitleScoring() as scoring:
                return Ranking(self, TitleRanker(scoring, candidates, self.world.device, decode))
            case unknown:
                assert_never(unknown)

    def validate(self) -> dict[str, float]:
        """Each metric's mean on the validation split, over `valid_users` users where that is set."""
        sample = self.config.valid_users or self.config.users
        validator = replace(self, config=self.config.model_copy(update={"users": sample}))
        return validator.at_current_weights().evaluate("valid").means(self.config)

    def refresh(self, items: EpochItems[Any]) -> None:
        """Compute item vectors that last an epoch anew."""
        items.keep(self.batches.encode_catalog(self.dataset.num_items, items.vectors))

    @property
    def batches(self) -> Batches:
        """How this rank goes through its share of users and items."""
        return Batches(self.world, self.config.batch_size, self.between)


@dataclass(frozen=True)
class Ranking:
    """Evaluations of one state of the weights."""

    evaluator: Evaluator
    ranker: Ranker

    def evaluate(self, split: Split, history: HistoryOrder = "original") -> Evaluation:
        """Rank the split's target of every user (or of the configured sample).

        Raises:
            ValueError: a score is NaN, or no user has a target in this split.
        """
        return self.evaluate_together([split], history)[split]

    @torch.no_grad()
    def evaluate_together(self, splits: Sequence[Split], history: HistoryOrder = "original") -> dict[Split, Evaluation]:
        """Evaluate several splits in one pass. A prompt that extends another split's costs only what it adds.

        That is so where both show a user's whole history and no vector of the user, and seldom once they are shuffled.
        Otherwise, as where the oldest item drops out of the prompt, each is run as if it were alone.
        """
        start = time.monotonic()
        parts, split_U = [], []
        for held_out in self._held_out(splits, history):
            parts.append(self._gather(self._rank(held_out), len(held_out)))
            split_U.append(held_out.split_B)
        found = Ranked.concatenate(parts)
        rows = {split: np.flatnonzero(np.concatenate(split_U) == SPLITS.index(split)) for split in splits}
        if missing := [split for split, row_U in rows.items() if not len(row_U)]:
            raise ValueError(
                f"no user of {self.evaluator.dataset.path} has a {missing[0]} item: build it with a lower --min-train"
            )
        seconds = time.monotonic() - start
        decoded = self.ranker.decodes
        return {split: _evaluation(found, row_U, seconds, decoded=decoded) for split, row_U in rows.items()}

    def _held_out(self, splits: Sequence[Split], history: HistoryOrder) -> Iterator[HeldOut]:
        """Groups of users, those of the sample only."""
        chosen = self._sample()
        dataset = self.evaluator.dataset
        for users in read_in_order(dataset.path, dataset.manifest):
            if chosen is not None:
                users = _only(users, chosen)
            parts = [(number, *users.targets(split)) for number, split in enumerate(SPLITS) if split in splits]
            histories = Histories.concatenate([found for _, found, _ in parts])
            target_B = np.concatenate([target_U for _, _, target_U in parts])
            split_B = np.concatenate([np.full(len(target_U), number) for number, _, target_U in parts])
            held_out = HeldOut(histories, target_B, split_B).take(np.argsort(histories.user_U, kind="stable"))
            if history == "shuffled":
                shown = held_out.histories.last(self.ranker.max_history)
                held_out = replace(held_out, histories=shown.shuffled(self.evaluator.config.seed))
            yield held_out

    def _sample(self) -> IntArray | None:
        total, config = self.evaluator.dataset.manifest.num_users, self.evaluator.config
        if config.users is None or config.users >= total:
            return None
        return np.sort(permutation(total, config.seed, 2)[: config.users])

    def _rank(self, held_out: HeldOut) -> Ranked:
        """This rank's share."""
        world = self.evaluator.world
        mine = held_out.take(share(len(held_out), world.rank, world.size))
        batches = self.evaluator.batches.of(len(held_out))
        return Ranked.concatenate([self.ranker.rank(mine.take(batch)) for batch in batches])

    def _gather(self, mine: Ranked, rows: int) -> Ranked:
        """All ranks' rows, on every rank."""
        ranks, world = mine.ranks, self.evaluator.world
        columns = torch.from_numpy(np.stack([ranks.greater, ranks.ties, ranks.candidates, *mine.judged_2B], axis=1))
        counts = torch.full((1, 1), mine.tokens)
        whole = world.gather_rows(columns.to(world.device), share_sizes(rows, world.size)).cpu().numpy().T
        total = world.gather_rows(counts.to(world.device), [1] * world.size).sum()
        return Ranked(Ranks(*(np.ascontiguousarray(column) for column in whole[:3])), whole[3:], int(total))


def _evaluation(found: Ranked, row_U: IntArray, seconds: float, *, decoded: bool) -> Evaluation:
    """One split's part of what was evaluated together, `decoded` where answers were."""
    ranks, part = found.ranks, len(row_U) / len(found.ranks)
    return Evaluation(
        Ranks(ranks.greater[row_U], ranks.ties[row_U], ranks.candidates[row_U]),
        seconds * part,
        round(found.tokens * part),
        dict(zip(GREEDY_METRICS, found.judged_2B[:, row_U], strict=True)) if decoded else {},
    )


def _only(users: Users, chosen: IntArray) -> Users:
    return users.take(np.flatnonzero(np.isin(users.train.user_U, chosen)))
