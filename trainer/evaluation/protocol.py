"""The evaluation protocol of all systems: same users, same stored candidates, same treatment of ties.

Users and items are sharded over ranks, and each is encoded exactly once. When several splits are evaluated together, a
user's histories are encoded in one batch, where a collator can share the common prefix of prompts that extend each
other.

Letters: U users of a group or of all evaluated, B held-out items of a group, N items of the catalog, D width of the
vectors.
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
from trainer.evaluation.item_vectors import ItemVectorFile, item_vectors
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
"""The greedily decoded answer is the target's title; it is the title of any candidate."""


@dataclass(frozen=True)
class Evaluation:
    """The rank of every evaluated user's target in one split."""

    user_U: IntArray
    """User indices, ascending."""
    ranks: Ranks
    seconds: float
    """Wall-clock time; that of splits evaluated together is divided in proportion to their users."""
    tokens: int
    """LLM tokens run for users, over all ranks, divided between splits like `seconds`; 0 without an LLM."""
    decoded: Mapping[str, IntArray] = field(default_factory=dict)
    """`GREEDY_METRICS` per user, (U,) of 0 or 1; empty if answers were not decoded."""

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
    """The task whose stored candidates are ranked."""
    between: Callable[[], None] = lambda: None
    """Called between batches, equally often on every rank; an exception that it raises ends the evaluation."""

    def at_current_weights(self, *, decode: bool = False, kept: ItemVectorFile | None = None) -> Ranking:
        """Prepare rankings with the model's current weights; item vectors, shared by all users, are encoded here once.

        Args:
            decode: also decode answers greedily and score them, if the system generates titles.
            kept: file for the item vectors of these weights (`trainer.evaluation.item_vectors`).
        """
        candidates = StoredCandidates(self.dataset, self.task)
        match self.scoring:
            case VectorScoring() as scoring:
                item_ND = item_vectors(scoring, self.dataset.num_items, self.batches, kept)
                full = self.config.candidates == "full"
                return Ranking(self, VectorRanker(scoring, candidates, full, self.world.device, item_ND))
            case TitleScoring() as scoring:
                return Ranking(self, TitleRanker(scoring, candidates, self.world.device, decode))
            case unknown:
                assert_never(unknown)

    def validate(self) -> dict[str, float]:
        """Each metric's mean on the validation split, over `valid_users` users if that is set."""
        return self.validation().evaluate("valid").means(self.config)

    def validation(self) -> Ranking:
        """Prepare a validation, of `valid_users` users if that is set, with the model's current weights."""
        sample = self.config.valid_users or self.config.users
        return replace(self, config=self.config.model_copy(update={"users": sample})).at_current_weights()

    def refresh(self, items: EpochItems[Any]) -> None:
        """Recompute the item vectors that are kept for an epoch."""
        items.keep(self.batches.encode_catalog(self.dataset.num_items, items.vectors))

    @property
    def batches(self) -> Batches:
        """Batches of this rank's share of users or items."""
        return Batches(self.world, self.config.batch_size, self.between)


@dataclass(frozen=True)
class Ranking:
    """Evaluates splits with one state of the weights."""

    evaluator: Evaluator
    ranker: Ranker

    def evaluate(self, split: Split, history: HistoryOrder = "original") -> Evaluation:
        """Rank the target of every user, or of the configured sample of users, in a split.

        Raises:
            ValueError: a score is NaN, or no user has a target in this split.
        """
        return self.evaluate_together([split], history)[split]

    @torch.no_grad()
    def evaluate_together(self, splits: Sequence[Split], history: HistoryOrder = "original") -> dict[Split, Evaluation]:
        """Evaluate several splits in one pass, where a prompt that extends another split's costs only the new tokens.

        That holds where both prompts show the user's whole history and no user vector, and rarely for shuffled
        histories. Otherwise, for instance if the oldest item drops out of the prompt, each prompt is run in full.

        Raises:
            ValueError: a score is NaN, or no user has a target in one of the splits.
        """
        start = time.monotonic()
        parts, split_U, user_U = [], [], []
        for held_out in self._held_out(splits, history):
            parts.append(self._gather(self._rank(held_out), len(held_out)))
            split_U.append(held_out.split_B)
            user_U.append(held_out.histories.user_U)
        found = Ranked.concatenate(parts)
        rows = {split: np.flatnonzero(np.concatenate(split_U) == SPLITS.index(split)) for split in splits}
        if missing := [split for split, row_U in rows.items() if not len(row_U)]:
            raise ValueError(
                f"no user of {self.evaluator.dataset.path} has a {missing[0]} item: build it with a lower --min-train"
            )
        seconds = time.monotonic() - start
        decoded = self.ranker.decodes
        users = np.concatenate(user_U)
        return {split: _evaluation(found, users, row_U, seconds, decoded=decoded) for split, row_U in rows.items()}

    def _held_out(self, splits: Sequence[Split], history: HistoryOrder) -> Iterator[HeldOut]:
        """Held-out items of the sampled users, group by group, each user's rows adjacent."""
        chosen = self._sample()
        dataset = self.evaluator.dataset
        for users in read_in_order(dataset.path, dataset.manifest):
            if chosen is not None:
                users = _only(users, chosen)
            parts = [(index, *users.targets(split)) for index, split in enumerate(SPLITS) if split in splits]
            histories = Histories.concatenate([found for _, found, _ in parts])
            target_B = np.concatenate([target_U for _, _, target_U in parts])
            split_B = np.concatenate([np.full(len(target_U), index) for index, _, target_U in parts])
            # Stable, so that of a user's histories, which share a prefix, the shorter comes first.
            held_out = HeldOut(histories, target_B, split_B).take(np.argsort(histories.user_U, kind="stable"))
            if history == "shuffled":
                # Cut first: only the items that the system reads are shuffled, so it reads the same items.
                shown = held_out.histories.last(self.ranker.max_history)
                held_out = replace(held_out, histories=shown.shuffled(self.evaluator.config.seed))
            yield held_out

    def _sample(self) -> IntArray | None:
        """Sorted user indices of the configured sample; None: all users."""
        total, config = self.evaluator.dataset.manifest.num_users, self.evaluator.config
        if config.users is None or config.users >= total:
            return None
        return np.sort(permutation(total, config.seed, 2)[: config.users])

    def _rank(self, held_out: HeldOut) -> Ranked:
        """Rank this rank's share."""
        world = self.evaluator.world
        mine = held_out.take(share(len(held_out), world.rank, world.size))
        batches = self.evaluator.batches.of(len(held_out))
        return Ranked.concatenate([self.ranker.rank(mine.take(batch)) for batch in batches])

    def _gather(self, mine: Ranked, rows: int) -> Ranked:
        """All-gather the rows of all ranks, and sum their tokens."""
        ranks, world = mine.ranks, self.evaluator.world
        columns = torch.from_numpy(np.stack([ranks.greater, ranks.ties, ranks.candidates, *mine.judged_2B], axis=1))
        counts = torch.full((1, 1), mine.tokens)
        whole = world.all_gather_results(columns.to(world.device), share_sizes(rows, world.size)).cpu().numpy().T
        total = world.all_gather_results(counts.to(world.device), [1] * world.size).sum()
        return Ranked(Ranks(*(np.ascontiguousarray(column) for column in whole[:3])), whole[3:], int(total))


def _evaluation(found: Ranked, users: IntArray, row_U: IntArray, seconds: float, *, decoded: bool) -> Evaluation:
    """The evaluation of one split, whose rows are `row_U`, out of the splits evaluated together."""
    ranks, part = found.ranks, len(row_U) / len(found.ranks)
    return Evaluation(
        users[row_U],
        Ranks(ranks.greater[row_U], ranks.ties[row_U], ranks.candidates[row_U]),
        seconds * part,
        round(found.tokens * part),
        dict(zip(GREEDY_METRICS, found.judged_2B[:, row_U], strict=True)) if decoded else {},
    )


def _only(users: Users, chosen: IntArray) -> Users:
    return users.take(np.flatnonzero(np.isin(users.train.user_U, chosen)))
