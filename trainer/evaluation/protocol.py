"""The one way every system is ranked: same users, same stored candidates, same treatment of ties.

Users and items are shared among ranks, and each is encoded exactly once.

Letters: U users, N items of the catalog, D width of the vectors, B users of a batch, C negatives.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from trainer.config import EvaluationConfig, Task
from trainer.data.batches import to_device
from trainer.data.catalog import Dataset
from trainer.data.packing import PackedPrompts
from trainer.data.plan import share, share_sizes
from trainer.data.randomness import IntArray, permutation
from trainer.data.stream import read_in_order
from trainer.data.title_batches import AnyCollator, TitleCollator
from trainer.data.users import Histories, Split, Users
from trainer.device import World, cut_graph
from trainer.evaluation.ranking import (
    Estimate,
    Floats,
    Ranks,
    bootstrap_all,
    concatenate,
    per_user_metrics,
    rank_candidates,
    rank_catalog,
)
from trainer.evaluation.titles import judge_greedy, merge_same_titles, normalized
from trainer.models import System
from trainer.models.interface import Recommender
from trainer.models.title_chooser import TitleChooser

History = Literal["original", "shuffled"]

GREEDY_METRICS = ("HR@1 (greedy)", "valid (greedy)")
"""The answer that greedy decoding writes is the target's title; it is the title of a candidate."""


@dataclass(frozen=True)
class Evaluation:
    """Where every evaluated user's target stands."""

    ranks: Ranks
    seconds: float
    tokens: int
    """LLM tokens run for users, over all ranks (0 for systems without an LLM)."""
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
class _Ranked:
    """Some users ranked."""

    ranks: Ranks
    judged_2U: IntArray
    """`GREEDY_METRICS`; zeros where nothing was decoded."""
    tokens: int


def _joined(parts: Sequence[_Ranked]) -> _Ranked:
    return _Ranked(
        concatenate(part.ranks for part in parts),
        np.concatenate([np.zeros((2, 0), np.int64), *(part.judged_2U for part in parts)], axis=1),
        sum(part.tokens for part in parts),
    )


@dataclass(frozen=True)
class Evaluator:
    """Ranks a model on a dataset; every rank of the run calls its methods together."""

    dataset: Dataset
    collator: AnyCollator
    config: EvaluationConfig
    world: World
    task: Task = "retrieval"
    """Whose stored candidates are ranked."""
    between: Callable[[], None] = lambda: None
    """Called between batches, as often on every rank; what it raises ends the evaluation."""

    def encode_items(self, model: Recommender | TitleChooser) -> Tensor | None:
        """(N, D) vectors of items 1 to N, whole on every rank: once for a state of the parameters.

        None for a system that compares titles and has no vectors.
        """
        return None if isinstance(model, TitleChooser) else self.encode_with(model.item_vectors)

    def refresh(self, system: System) -> None:
        """Compute the system's item vectors anew, if they last an epoch: what an epoch starts with."""
        if system.epoch_items:
            system.model.eval()
            system.epoch_items.keep(self.encode_with(system.epoch_items.encode))

    @torch.no_grad()
    def encode_with(self, encode: Callable[[Any], Tensor]) -> Tensor:
        """The same by a function from the collator's `items` batch to vectors."""
        assert not isinstance(self.collator, TitleCollator), "titles have no vectors"
        item_N = np.arange(1, self.dataset.num_items + 1)
        sizes = share_sizes(len(item_N), self.world.size)
        mine = item_N[share(len(item_N), self.world.rank, self.world.size)]
        parts = [
            encode(to_device(self.collator.items(mine[batch]), self.world.device)).float()
            for batch in self._batches(sizes)
        ]
        return self.world.gather_rows(torch.cat(parts), sizes)

    @torch.no_grad()
    def evaluate(
        self,
        model: Recommender | TitleChooser,
        item_ND: Tensor | None,
        split: Split,
        history: History = "original",
        *,
        decode: bool = False,
    ) -> Evaluation:
        """Rank the split's target of every user (or of the configured sample).

        Args:
            decode: also write answers greedily and judge them, where the system answers in titles.

        Raises:
            ValueError: a score is NaN, or no user has a target in this split.
        """
        start = time.monotonic()
        parts = []
        for histories, target_U in self._targets(split):
            if history == "shuffled":
                histories = histories.last(self.collator.max_history).shuffled(self.config.seed)
            parts.append(self._gather(self._rank(model, item_ND, histories, target_U, split, decode), len(histories)))
        whole = _joined(parts)
        if not len(whole.ranks):
            raise ValueError(f"no user of {self.dataset.path} has a {split} item: build it with a lower --min-train")
        decoded = dict(zip(GREEDY_METRICS, whole.judged_2U, strict=True)) if decode and item_ND is None else {}
        return Evaluation(whole.ranks, time.monotonic() - start, whole.tokens, decoded)

    def validate(self, model: Recommender | TitleChooser) -> dict[str, float]:
        """Each metric's mean on the validation split, over `valid_users` users where that is set."""
        sample = self.config.valid_users or self.config.users
        validator = replace(self, config=self.config.model_copy(update={"users": sample}))
        return validator.evaluate(model, self.encode_items(model), "valid").means(self.config)

    def _targets(self, split: Split) -> Iterator[tuple[Histories, IntArray]]:
        """Groups of users with their target, those of the sample only."""
        chosen = self._sample()
        for users in read_in_order(self.dataset.path, self.dataset.manifest):
            if chosen is not None:
                users = _only(users, chosen)
            yield users.targets(split)

    def _sample(self) -> IntArray | None:
        total = self.dataset.manifest.num_users
        if self.config.users is None or self.config.users >= total:
            return None
        return np.sort(permutation(total, self.config.seed, 2)[: self.config.users])

    def _rank(
        self,
        model: Recommender | TitleChooser,
        item_ND: Tensor | None,
        histories: Histories,
        target_U: IntArray,
        split: Split,
        decode: bool,
    ) -> _Ranked:
        """This rank's share of the users."""
        rows = share(len(histories), self.world.rank, self.world.size)
        mine, target_B = histories.take(rows), target_U[rows]
        parts = []
        for batch in self._batches(share_sizes(len(histories), self.world.size)):
            if isinstance(model, TitleChooser):
                parts.append(self._rank_titles(model, mine.take(batch), target_B[batch], split, decode))
            else:
                assert item_ND is not None
                parts.append(self._rank_vectors(model, item_ND, mine.take(batch), target_B[batch], split))
        return _joined(parts)

    def _rank_vectors(
        self, model: Recommender, item_ND: Tensor, histories: Histories, target_B: IntArray, split: Split
    ) -> _Ranked:
        """By inner product."""
        assert not isinstance(self.collator, TitleCollator)
        features = self.collator.histories(histories)
        user_BD = model.user_vectors(to_device(features, self.world.device)).float()
        if self.config.candidates == "full":
            bounds = zip(histories.offset_U1[:-1], histories.offset_U1[1:], strict=True)
            seen = [histories.item_E[a:b] for a, b in bounds]
            ranks = rank_catalog(user_BD, item_ND, torch.from_numpy(target_B).to(user_BD.device), seen)
        else:
            item_BC = self._candidates(histories, target_B, split)
            candidate_BCD = item_ND[torch.from_numpy(item_BC - 1).to(item_ND.device)]
            ranks = self._rank_scores(torch.einsum("bd,bcd->bc", user_BD, candidate_BCD), item_BC)
        return _Ranked(ranks, np.zeros((2, len(histories)), np.int64), _useful_tokens(features))

    def _rank_titles(
        self, model: TitleChooser, histories: Histories, target_B: IntArray, split: Split, decode: bool
    ) -> _Ranked:
        """By the likelihood of titles."""
        assert isinstance(self.collator, TitleCollator)
        item_BC = self._candidates(histories, target_B, split)
        features = self.collator.choices(histories, item_BC)
        scores = model.compare(to_device(features, self.world.device))
        judged_2B = np.zeros((2, len(histories)), np.int64)
        if decode:
            judged_2B = np.stack(
                judge_greedy(model, self.collator, histories, item_BC, scores.greedy_BC, self.world.device)
            )
        return _Ranked(self._rank_scores(scores.score_BC, item_BC), judged_2B, _useful_tokens(features))

    def _candidates(self, histories: Histories, target_B: IntArray, split: Split) -> IntArray:
        """(B, C) items to rank, the target first."""
        negative_BC = self.dataset.candidates("title" if self.task == "generation" else "retrieval", split)
        return np.concatenate([target_B[:, None], negative_BC[histories.user_U]], axis=1)

    def _rank_scores(self, score_BC: Tensor, item_BC: IntArray) -> Ranks:
        if self.task == "generation":
            score_BC = merge_same_titles(score_BC, item_BC, self._normalized_titles)
        return rank_candidates(score_BC)

    @cached_property
    def _normalized_titles(self) -> list[str]:
        return ["", *(normalized(title) for title in self.dataset.titles)]

    def _gather(self, mine: _Ranked, users: int) -> _Ranked:
        """All ranks' users, on every rank."""
        ranks = mine.ranks
        columns = torch.from_numpy(np.stack([ranks.greater, ranks.ties, ranks.candidates, *mine.judged_2U], axis=1))
        counts = torch.full((1, 1), mine.tokens)
        sizes = share_sizes(users, self.world.size)
        whole = self.world.gather_rows(columns.to(self.world.device), sizes).cpu().numpy().T
        total = self.world.gather_rows(counts.to(self.world.device), [1] * self.world.size).sum()
        return _Ranked(Ranks(*(np.ascontiguousarray(column) for column in whole[:3])), whole[3:], int(total))

    def _batches(self, sizes: list[int]) -> Iterator[slice]:
        """The same number of batches on every rank, some perhaps empty: ZeRO-3 gathers weights in step."""
        size = self.config.batch_size
        for first in range(0, max([*sizes, 1]), size):
            yield slice(first, first + size)
            cut_graph()
            self.between()


def _only(users: Users, chosen: IntArray) -> Users:
    return users.take(np.flatnonzero(np.isin(users.train.user_U, chosen)))


def _useful_tokens(batch: Any) -> int:
    prompts = getattr(batch, "prompts", None)
    return prompts.useful_tokens if isinstance(prompts, PackedPrompts) else 0
