"""The one way every system is ranked: same users, same stored candidates, same treatment of ties.

Users and items are shared among ranks, and each is encoded exactly once.

Letters: U users, N items of the catalog, D width of the vectors, B users of a batch, C negatives.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from trainer.config import EvaluationConfig
from trainer.data.batches import Collator, to_device
from trainer.data.catalog import Dataset
from trainer.data.packing import PackedPrompts
from trainer.data.plan import share, share_sizes
from trainer.data.randomness import IntArray, permutation
from trainer.data.stream import read_in_order
from trainer.data.users import Histories, Split, Users
from trainer.device import World
from trainer.evaluation.ranking import (
    Estimate,
    Ranks,
    bootstrap_all,
    concatenate,
    per_user_metrics,
    rank_candidates,
    rank_catalog,
)
from trainer.models import System
from trainer.models.interface import Recommender

History = Literal["original", "shuffled"]


@dataclass(frozen=True)
class Evaluation:
    """Where every evaluated user's target stands."""

    ranks: Ranks
    seconds: float
    tokens: int
    """LLM tokens run for users, over all ranks (0 for systems without an LLM)."""

    def means(self, config: EvaluationConfig) -> dict[str, float]:
        """Each metric's mean over users."""
        return {name: float(value_U.mean()) for name, value_U in per_user_metrics(self.ranks, tie=config.tie).items()}

    def estimates(self, config: EvaluationConfig) -> dict[str, Estimate]:
        """Each metric with its 95 % bootstrap interval over users."""
        return bootstrap_all(per_user_metrics(self.ranks, tie=config.tie), seed=config.seed)


@dataclass(frozen=True)
class Evaluator:
    """Ranks a model on a dataset; every rank of the run calls its methods together."""

    dataset: Dataset
    collator: Collator[Any, Any, Any]
    config: EvaluationConfig
    world: World

    def encode_items(self, model: Recommender) -> Tensor:
        """(N, D) vectors of items 1 to N, whole on every rank: once for a state of the parameters."""
        return self.encode_with(model.item_vectors)

    def refresh(self, system: System) -> None:
        """Compute the system's item vectors anew, if they last an epoch: what an epoch starts with."""
        if system.epoch_items:
            system.model.eval()
            system.epoch_items.keep(self.encode_with(system.epoch_items.encode))

    @torch.no_grad()
    def encode_with(self, encode: Callable[[Any], Tensor]) -> Tensor:
        """The same by a function from the collator's `items` batch to vectors."""
        item_N = np.arange(1, self.dataset.num_items + 1)
        sizes = share_sizes(len(item_N), self.world.size)
        mine = item_N[share(len(item_N), self.world.rank, self.world.size)]
        parts = [
            encode(to_device(self.collator.items(mine[batch]), self.world.device)).float()
            for batch in self._batches(sizes)
        ]
        return self.world.gather_rows(torch.cat(parts), sizes)

    @torch.no_grad()
    def evaluate(self, model: Recommender, item_ND: Tensor, split: Split, history: History = "original") -> Evaluation:
        """Rank the split's target of every user (or of the configured sample).

        Raises:
            ValueError: a score is NaN, or no user has a target in this split.
        """
        start = time.monotonic()
        parts, tokens = [], 0
        for histories, target_U in self._targets(split):
            if history == "shuffled":
                histories = histories.last(self.collator.max_history).shuffled(self.config.seed)
            ranks, used = self._rank(model, item_ND, histories, target_U, split)
            parts.append(ranks)
            tokens += used
        ranks = concatenate(parts)
        if not len(ranks):
            raise ValueError(f"no user of {self.dataset.path} has a {split} item: build it with a lower --min-train")
        return Evaluation(ranks, time.monotonic() - start, tokens)

    def validate(self, model: Recommender) -> dict[str, float]:
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
        self, model: Recommender, item_ND: Tensor, histories: Histories, target_U: IntArray, split: Split
    ) -> tuple[Ranks, int]:
        sizes = share_sizes(len(histories), self.world.size)
        rows = share(len(histories), self.world.rank, self.world.size)
        mine, target_B = histories.take(rows), target_U[rows]
        parts, tokens = [], 0
        for batch in self._batches(sizes):
            part = mine.take(batch)
            features = self.collator.histories(part)
            tokens += _useful_tokens(features)
            user_BD = model.user_vectors(to_device(features, self.world.device)).float()
            parts.append(self._rank_batch(user_BD, item_ND, part, target_B[batch], split))
        ranks = concatenate(parts)
        columns = torch.from_numpy(np.stack([ranks.greater, ranks.ties, ranks.candidates], axis=1))
        counts = torch.full((1, 1), tokens)
        whole = self.world.gather_rows(columns.to(self.world.device), sizes).cpu().numpy()
        total = self.world.gather_rows(counts.to(self.world.device), [1] * self.world.size).sum()
        return Ranks(*(np.ascontiguousarray(whole[:, column]) for column in range(3))), int(total)

    def _rank_batch(
        self, user_BD: Tensor, item_ND: Tensor, histories: Histories, target_B: IntArray, split: Split
    ) -> Ranks:
        if self.config.candidates == "full":
            seen = [
                histories.item_E[a:b] for a, b in zip(histories.offset_U1[:-1], histories.offset_U1[1:], strict=True)
            ]
            return rank_catalog(user_BD, item_ND, torch.from_numpy(target_B).to(user_BD.device), seen)
        negative_BC = self.dataset.candidates("retrieval", split)[histories.user_U]
        item_BC = np.concatenate([target_B[:, None], negative_BC], axis=1)
        candidate_BCD = item_ND[torch.from_numpy(item_BC - 1).to(item_ND.device)]
        return rank_candidates(torch.einsum("bd,bcd->bc", user_BD, candidate_BCD))

    def _batches(self, sizes: list[int]) -> list[slice]:
        """The same number of batches on every rank, some perhaps empty: ZeRO-3 gathers weights in step."""
        size = self.config.batch_size
        return [slice(first, first + size) for first in range(0, max([*sizes, 1]), size)]


def _only(users: Users, chosen: IntArray) -> Users:
    return users.take(np.flatnonzero(np.isin(users.train.user_U, chosen)))


def _useful_tokens(batch: Any) -> int:
    prompts = getattr(batch, "prompts", None)
    return prompts.useful_tokens if isinstance(prompts, PackedPrompts) else 0
