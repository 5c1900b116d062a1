"""The evaluation protocol of all systems: same users, same stored candidates, same treatment of ties.

Users and items are sharded over ranks, and each is encoded exactly once. When several splits are evaluated together, a
user's histories are encoded in one batch, where a collator can share the common prefix of prompts that extend each
other.

Letters: U users of a group or of all evaluated, B held-out items of a group, N items of the catalog, D width of the
vectors, K length of a list.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, assert_never

import numpy as np
import torch
from torch import Tensor

from trainer.config import EvaluationConfig, HistoryOrder, Split, Task
from trainer.data.reading.counter_rng import IntArray, permutation
from trainer.data.reading.dataset import Dataset
from trainer.data.reading.histories import Histories, Users
from trainer.data.reading.shards import read_in_order
from trainer.distributed import World
from trainer.evaluation.item_vectors import ItemVectorFile, item_vectors
from trainer.evaluation.progress import Progress
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
from trainer.evaluation.ranking import Estimate, Floats, Ranks, bootstrap_all, mean_per_user, metrics_per_target
from trainer.models.scoring import TitleScoring, VectorScoring
from trainer.models.system import EpochItems
from trainer.runs.batch_shares import share, share_sizes

_EVENTS_AT_ONCE = 1 << 24
"""Events of the histories before successive targets that are held at a time: 0.3 GB, and as much again for a copy."""

GREEDY_METRICS = ("HR@1 (greedy)", "valid (greedy)")
"""The greedily decoded answer is the target's title; it is the title of any candidate."""


@dataclass(frozen=True)
class Evaluation:
    """The ranks of every evaluated user's targets in one split.

    Letters: T targets, one per user, except in the test of a split with successive targets.
    """

    user_T: IntArray
    """Index of the user of each target, ascending."""
    ranks: Ranks
    seconds: float
    """Wall-clock time; that of splits evaluated together is divided in proportion to their targets."""
    tokens: int
    """LLM tokens run for users, over all ranks, divided between splits like `seconds`; 0 without an LLM."""
    top_TK: IntArray = field(default_factory=lambda: np.zeros((0, 0), np.int64))
    """Item ids that would be recommended before each target (`Ranked.top_BK`); K is 0 if none were listed."""
    decoded: Mapping[str, IntArray] = field(default_factory=dict)
    """`GREEDY_METRICS` per target, (T,) of 0 or 1; empty if answers were not decoded."""

    def means(self, config: EvaluationConfig) -> dict[str, float]:
        """Each metric's mean over users."""
        return {name: float(value_U.mean()) for name, value_U in self._metrics(config).items()}

    def estimates(self, config: EvaluationConfig, more: Mapping[str, Floats] | None = None) -> dict[str, Estimate]:
        """Each metric with its 95 % bootstrap interval over users.

        Args:
            more: further metrics per target, (T,), to be estimated on the same resamples.
        """
        return bootstrap_all(self._metrics(config, more or {}), seed=config.seed)

    def over_targets(self, config: EvaluationConfig) -> dict[str, float]:
        """The number of targets, and each metric's mean over them, where users have several: not the mean over users,
        because those with many targets count more. Empty where users have one each."""
        if len(np.unique(self.user_T)) == len(self.user_T):
            return {}
        metrics = metrics_per_target(self.ranks, tie=config.tie)
        means = {f"{name} over targets": float(value_T.mean()) for name, value_T in metrics.items()}
        return {"targets": float(len(self.user_T)), **means}

    def _metrics(
        self, config: EvaluationConfig, more: Mapping[str, Floats] = MappingProxyType({})
    ) -> dict[str, Floats]:
        """(U,) metrics per user."""
        found = metrics_per_target(self.ranks, tie=config.tie)
        found |= {name: value_T.astype(np.float64) for name, value_T in self.decoded.items()}
        return {name: mean_per_user(self.user_T, value_T) for name, value_T in {**found, **more}.items()}


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

    def at_current_weights(
        self, *, decode: bool = False, kept: ItemVectorFile | None = None, list_length: int = 0
    ) -> Ranking:
        """Prepare rankings with the model's current weights; item vectors, shared by all users, are encoded here once.

        Args:
            decode: also decode answers greedily and score them, if the system generates titles.
            kept: file for the item vectors of these weights (`trainer.evaluation.item_vectors`).
            list_length: items of the whole catalog to list per user, if the system has vectors.
        """
        stored = StoredCandidates(self.dataset, self.task)
        match self.scoring:
            case VectorScoring() as scoring:
                item_ND = item_vectors(scoring, self.dataset.num_items, self.batches, kept)
                return Ranking(
                    self,
                    VectorRanker(scoring, stored, self.config.candidates, self.world.device, item_ND, list_length),
                )
            case TitleScoring() as scoring:
                return Ranking(self, TitleRanker(scoring, stored, self.world.device, decode))
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

    def sampled_users(self, splits: Sequence[Split]) -> IntArray | None:
        """Sorted user indices of the configured sample; None: all users."""
        manifest, users = self.dataset.manifest, self.config.users
        if users is None:
            return None
        size = max(manifest.sample_size(users, split) for split in splits)
        if size >= manifest.num_users:
            return None
        return np.sort(permutation(manifest.num_users, self.config.seed, 2)[:size])

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
        """Rank the targets of every user, or of the configured sample of users, in a split.

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
        parts, split_T, user_T = [], [], []
        with self._progress(splits) as progress:
            for held_out in self._held_out(splits, history):
                parts.append(self._gather(self._rank(held_out, progress), len(held_out)))
                split_T.append(held_out.split_B)
                user_T.append(held_out.histories.user_U)
        found = Ranked.concatenate(parts)
        rows = {split: np.flatnonzero(np.concatenate(split_T) == SPLITS.index(split)) for split in splits}
        if missing := [split for split, row_T in rows.items() if not len(row_T)]:
            raise self._no_targets(missing[0])
        seconds = time.monotonic() - start
        decoded = self.ranker.decodes
        users = np.concatenate(user_T)
        return {split: _evaluation(found, users, row_T, seconds, decoded=decoded) for split, row_T in rows.items()}

    @torch.no_grad()
    def user_vectors(self, split: Split, history: HistoryOrder = "original") -> tuple[HeldOut, Tensor]:
        """The held-out items of a split, and the (B, D) vectors of their histories, complete on every rank.

        Raises:
            ValueError: the system scores titles and has no vectors, or no user has a target in this split.
        """
        if not isinstance(self.ranker, VectorRanker):
            raise ValueError("a system of task=generation has no vectors: train one with task=retrieval")
        scoring, world = self.ranker.scoring, self.evaluator.world
        groups, vectors = [], []
        for held_out in self._held_out([split], history):
            mine = held_out.take(share(len(held_out), world.rank, world.size))
            batches = self.evaluator.batches.of(len(held_out))
            parts = [
                scoring.user_vectors(mine.take(batch).histories, self.ranker.device).vector_BD for batch in batches
            ]
            vectors.append(world.all_gather_results(torch.cat(parts), share_sizes(len(held_out), world.size)).cpu())
            groups.append(held_out)
        found = HeldOut.concatenate(groups)
        if not len(found):
            raise self._no_targets(split)
        return found, torch.cat(vectors)

    def _no_targets(self, split: Split) -> ValueError:
        path = self.evaluator.dataset.path
        sample = self.evaluator.config.users
        cure = "build it with a lower --min-train" if sample is None else f"raise evaluation.users={sample}"
        return ValueError(f"no user of {path} has a {split} item: {cure}")

    def _held_out(self, splits: Sequence[Split], history: HistoryOrder) -> Iterator[HeldOut]:
        """Held-out items of the sampled users, group by group, each user's rows adjacent."""
        chosen = self.evaluator.sampled_users(splits)
        dataset = self.evaluator.dataset
        groups = read_in_order(dataset.path, dataset.manifest)
        chosen_groups = (users if chosen is None else _only(users, chosen) for users in groups)
        for users in (block for group in chosen_groups for block in group.in_blocks(_EVENTS_AT_ONCE)):
            users = users.dated(dataset.repeat_dates)
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

    def _progress(self, splits: Sequence[Split]) -> Progress:
        """Counts targets; of a sample of users, about as many as there are on average."""
        chosen, manifest = self.evaluator.sampled_users(splits), self.evaluator.dataset.manifest
        share = 1.0 if chosen is None else len(chosen) / manifest.num_users
        total = round(share * sum(manifest.num_targets(split) for split in splits))
        return Progress("ranking users", total, enabled=self.evaluator.world.is_main)

    def _rank(self, held_out: HeldOut, progress: Progress) -> Ranked:
        """Rank this rank's share."""
        world = self.evaluator.world
        mine = held_out.take(share(len(held_out), world.rank, world.size))
        batches = self.evaluator.batches.of(len(held_out), progress)
        return Ranked.concatenate([self.ranker.rank(mine.take(batch)) for batch in batches])

    def _gather(self, mine: Ranked, rows: int) -> Ranked:
        """All-gather the rows of all ranks, and sum their tokens."""
        ranks, world = mine.ranks, self.evaluator.world
        numbers = [ranks.greater, ranks.ties, ranks.candidates, *mine.judged_2B, *mine.top_BK.T]
        columns = torch.from_numpy(np.stack(numbers, axis=1))
        counts = torch.full((1, 1), mine.tokens)
        whole = world.all_gather_results(columns.to(world.device), share_sizes(rows, world.size)).cpu().numpy().T
        total = world.all_gather_results(counts.to(world.device), [1] * world.size).sum()
        return Ranked(
            Ranks(*(np.ascontiguousarray(column) for column in whole[:3])), whole[3:5], whole[5:].T, int(total)
        )


def _evaluation(found: Ranked, users: IntArray, row_T: IntArray, seconds: float, *, decoded: bool) -> Evaluation:
    """The evaluation of one split, whose rows are `row_T`, out of the splits evaluated together."""
    ranks, part = found.ranks, len(row_T) / len(found.ranks)
    return Evaluation(
        users[row_T],
        Ranks(ranks.greater[row_T], ranks.ties[row_T], ranks.candidates[row_T]),
        seconds * part,
        round(found.tokens * part),
        found.top_BK[row_T],
        dict(zip(GREEDY_METRICS, found.judged_2B[:, row_T], strict=True)) if decoded else {},
    )


def _only(users: Users, chosen: IntArray) -> Users:
    return users.take(np.flatnonzero(np.isin(users.train.user_U, chosen)))
