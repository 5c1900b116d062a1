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
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from trainer.config import EvaluationConfig, Task
from trainer.data.collators.base import to_device
from trainer.data.collators.generation import AnyCollator, TitleCollator
from trainer.data.prompts.packing import PackedPrompts
from trainer.data.reading.counter_rng import IntArray, permutation
from trainer.data.reading.dataset import Dataset
from trainer.data.reading.histories import Histories, Split, Users
from trainer.data.reading.shards import read_in_order
from trainer.device import cut_graph
from trainer.distributed import World
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
from trainer.models.llm.generation import TitleChooser
from trainer.runs.batch_shares import share, share_sizes

History = Literal["original", "shuffled"]

GREEDY_METRICS = ("HR@1 (greedy)", "valid (greedy)")
"""The answer that greedy decoding writes is the target's title; it is the title of a candidate."""


_SPLITS: tuple[Split, ...] = get_args(Split)
"""A user's history in one is the beginning of that in the next."""


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
class _Asked:
    """Histories and the item that follows each; a user's stand together."""

    histories: Histories
    target_R: IntArray
    split_R: IntArray
    """Places in `_SPLITS`."""

    def __len__(self) -> int:
        return len(self.histories)

    def take(self, rows: IntArray | slice) -> _Asked:
        return _Asked(self.histories.take(rows), self.target_R[rows], self.split_R[rows])


@dataclass(frozen=True)
class _Ranked:
    """Some histories ranked."""

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
        return self.evaluate_together(model, item_ND, [split], history, decode=decode)[split]

    @torch.no_grad()
    def evaluate_together(
        self,
        model: Recommender | TitleChooser,
        item_ND: Tensor | None,
        splits: Sequence[Split],
        history: History = "original",
        *,
        decode: bool = False,
    ) -> dict[Split, Evaluation]:
        """The same of several splits. A prompt that extends another split's costs only what it adds.

        That is so where both show a user's whole history and no vector of the user, and seldom once they are shuffled.
        Otherwise, as where the oldest item drops out of the prompt, each is run as if it were alone.
        """
        start = time.monotonic()
        parts, split_R = [], []
        for asked in self._asked(splits, history):
            parts.append(self._gather(self._rank(model, item_ND, asked, decode), len(asked)))
            split_R.append(asked.split_R)
        found = _joined(parts)
        rows = {split: np.flatnonzero(np.concatenate(split_R) == _SPLITS.index(split)) for split in splits}
        if missing := [split for split, row_U in rows.items() if not len(row_U)]:
            raise ValueError(
                f"no user of {self.dataset.path} has a {missing[0]} item: build it with a lower --min-train"
            )
        seconds, decoded = time.monotonic() - start, decode and item_ND is None
        return {split: _evaluation(found, row_U, seconds, decoded=decoded) for split, row_U in rows.items()}

    def validate(self, model: Recommender | TitleChooser) -> dict[str, float]:
        """Each metric's mean on the validation split, over `valid_users` users where that is set."""
        sample = self.config.valid_users or self.config.users
        validator = replace(self, config=self.config.model_copy(update={"users": sample}))
        return validator.evaluate(model, self.encode_items(model), "valid").means(self.config)

    def _asked(self, splits: Sequence[Split], history: History) -> Iterator[_Asked]:
        """Groups of users, those of the sample only."""
        chosen = self._sample()
        for users in read_in_order(self.dataset.path, self.dataset.manifest):
            if chosen is not None:
                users = _only(users, chosen)
            parts = [(number, *users.targets(split)) for number, split in enumerate(_SPLITS) if split in splits]
            histories = Histories.concatenate([found for _, found, _ in parts])
            target_R = np.concatenate([target_U for _, _, target_U in parts])
            split_R = np.concatenate([np.full(len(target_U), number) for number, _, target_U in parts])
            by_user_R = np.argsort(histories.user_U, kind="stable")
            asked = _Asked(histories, target_R, split_R).take(by_user_R)
            if history == "shuffled":
                shuffled = asked.histories.last(self.collator.max_history).shuffled(self.config.seed)
                asked = replace(asked, histories=shuffled)
            yield asked

    def _sample(self) -> IntArray | None:
        total = self.dataset.manifest.num_users
        if self.config.users is None or self.config.users >= total:
            return None
        return np.sort(permutation(total, self.config.seed, 2)[: self.config.users])

    def _rank(self, model: Recommender | TitleChooser, item_ND: Tensor | None, asked: _Asked, decode: bool) -> _Ranked:
        """This rank's share."""
        mine = asked.take(share(len(asked), self.world.rank, self.world.size))
        parts = []
        for batch in self._batches(share_sizes(len(asked), self.world.size)):
            if isinstance(model, TitleChooser):
                parts.append(self._rank_titles(model, mine.take(batch), decode))
            else:
                assert item_ND is not None
                parts.append(self._rank_vectors(model, item_ND, mine.take(batch)))
        return _joined(parts)

    def _rank_vectors(self, model: Recommender, item_ND: Tensor, asked: _Asked) -> _Ranked:
        """By inner product."""
        assert not isinstance(self.collator, TitleCollator)
        histories = asked.histories
        features = self.collator.histories(histories)
        user_BD = model.user_vectors(to_device(features, self.world.device)).float()
        if self.config.candidates == "full":
            bounds = zip(histories.offset_U1[:-1], histories.offset_U1[1:], strict=True)
            seen = [histories.item_E[a:b] for a, b in bounds]
            ranks = rank_catalog(user_BD, item_ND, torch.from_numpy(asked.target_R).to(user_BD.device), seen)
        else:
            item_BC = self._candidates(asked)
            candidate_BCD = item_ND[torch.from_numpy(item_BC - 1).to(item_ND.device)]
            ranks = self._rank_scores(torch.einsum("bd,bcd->bc", user_BD, candidate_BCD), item_BC)
        return _Ranked(ranks, np.zeros((2, len(asked)), np.int64), _useful_tokens(features))

    def _rank_titles(self, model: TitleChooser, asked: _Asked, decode: bool) -> _Ranked:
        """By the likelihood of titles."""
        assert isinstance(self.collator, TitleCollator)
        item_BC = self._candidates(asked)
        features = self.collator.choices(asked.histories, item_BC)
        scores = model.compare(to_device(features, self.world.device))
        judged_2B = np.zeros((2, len(asked)), np.int64)
        if decode:
            judged_2B = np.stack(
                judge_greedy(model, self.collator, asked.histories, item_BC, scores.greedy_BC, self.world.device)
            )
        return _Ranked(self._rank_scores(scores.score_BC, item_BC), judged_2B, _useful_tokens(features))

    def _candidates(self, asked: _Asked) -> IntArray:
        """(B, C) items to rank, the target first."""
        user_B = asked.histories.user_U
        of_valid, of_test = (
            self.dataset.candidates("title" if self.task == "generation" else "retrieval", split)[user_B]
            for split in _SPLITS
        )
        is_valid_B1 = asked.split_R[:, None] == _SPLITS.index("valid")
        return np.concatenate([asked.target_R[:, None], np.where(is_valid_B1, of_valid, of_test)], axis=1)

    def _rank_scores(self, score_BC: Tensor, item_BC: IntArray) -> Ranks:
        if self.task == "generation":
            score_BC = merge_same_titles(score_BC, item_BC, self._normalized_titles)
        return rank_candidates(score_BC)

    @cached_property
    def _normalized_titles(self) -> list[str]:
        return ["", *(normalized(title) for title in self.dataset.titles)]

    def _gather(self, mine: _Ranked, rows: int) -> _Ranked:
        """All ranks' rows, on every rank."""
        ranks = mine.ranks
        columns = torch.from_numpy(np.stack([ranks.greater, ranks.ties, ranks.candidates, *mine.judged_2U], axis=1))
        counts = torch.full((1, 1), mine.tokens)
        sizes = share_sizes(rows, self.world.size)
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


def _evaluation(found: _Ranked, row_U: IntArray, seconds: float, *, decoded: bool) -> Evaluation:
    """One split's part of what was evaluated together, `decoded` where answers were."""
    ranks, part = found.ranks, len(row_U) / len(found.ranks)
    return Evaluation(
        Ranks(ranks.greater[row_U], ranks.ties[row_U], ranks.candidates[row_U]),
        seconds * part,
        round(found.tokens * part),
        dict(zip(GREEDY_METRICS, found.judged_2U[:, row_U], strict=True)) if decoded else {},
    )


def _only(users: Users, chosen: IntArray) -> Users:
    return users.take(np.flatnonzero(np.isin(users.train.user_U, chosen)))


def _useful_tokens(batch: Any) -> int:
    prompts = getattr(batch, "prompts", None)
    return prompts.useful_tokens if isinstance(prompts, PackedPrompts) else 0
