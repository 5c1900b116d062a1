"""Rankers of held-out items at fixed weights: by inner product of vectors, or by the likelihood of titles.

Letters: B held-out items of a batch, C candidates, D width of the vectors, K length of a list, N items of the catalog.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, get_args

import numpy as np
import torch
from torch import Tensor

from trainer.config import Candidates, Split, Task
from trainer.data.collators.base import to_device
from trainer.data.raw.items import normalized
from trainer.data.reading.counter_rng import IntArray
from trainer.data.reading.dataset import Dataset
from trainer.data.reading.histories import Histories
from trainer.device import float64_device, mark_step
from trainer.distributed import World
from trainer.evaluation.catalog import Catalog
from trainer.evaluation.progress import Progress
from trainer.evaluation.ranking import Ranks, concatenate, rank_candidates
from trainer.evaluation.titles import judge_greedy, merge_same_titles
from trainer.models.scoring import TitleScoring, VectorScoring
from trainer.runs.batch_shares import share, share_sizes

SPLITS: tuple[Split, ...] = get_args(Split)
"""In order of time: a user's history in one split is a prefix of that in the next."""


@dataclass(frozen=True)
class HeldOut:
    """Histories and the item that follows each; a user's rows are adjacent."""

    histories: Histories
    target_B: IntArray
    split_B: IntArray
    """Indices into `SPLITS`."""

    def __len__(self) -> int:
        return len(self.histories)

    def take(self, rows: IntArray | slice) -> HeldOut:
        """Select rows, in this order."""
        return HeldOut(self.histories.take(rows), self.target_B[rows], self.split_B[rows])

    @staticmethod
    def concatenate(parts: Sequence[HeldOut]) -> HeldOut:
        """Join the rows of all parts, in order."""
        return HeldOut(
            Histories.concatenate([part.histories for part in parts]),
            np.concatenate([part.target_B for part in parts]),
            np.concatenate([part.split_B for part in parts]),
        )


@dataclass(frozen=True)
class Ranked:
    """Ranking results of held-out items."""

    ranks: Ranks
    judged_2B: IntArray
    """Whether the greedily decoded answer is right, and whether it is valid, 0 or 1; zeros if none was decoded."""
    top_BK: IntArray
    """Ids of the best items of the catalog, best first, padded with 0; K is 0 if they are not listed."""
    tokens: int
    """LLM tokens of the prompts; 0 without an LLM."""

    @staticmethod
    def concatenate(parts: Sequence[Ranked]) -> Ranked:
        """Join the rows of all parts, in order."""
        return Ranked(
            concatenate(part.ranks for part in parts),
            np.concatenate([np.zeros((2, 0), np.int64), *(part.judged_2B for part in parts)], axis=1),
            np.concatenate([part.top_BK for part in parts]) if parts else np.zeros((0, 0), np.int64),
            sum(part.tokens for part in parts),
        )


@dataclass(frozen=True)
class Batches:
    """Batches of a rank's share of users or items, in step with the other ranks."""

    world: World
    size: int
    """Rows per batch."""
    between: Callable[[], None]
    """Called between batches, equally often on every rank; an exception that it raises ends the evaluation."""

    def of(self, rows: int, progress: Progress | None = None) -> Iterator[slice]:
        """Slices of this rank's share of `rows` rows.

        The same number on every rank, some possibly empty: under ZeRO-3 a forward pass is collective.

        Args:
            progress: counts the rows of all ranks, a batch of each at a time.
        """
        for first in range(0, max([*share_sizes(rows, self.world.size), 1]), self.size):
            yield slice(first, first + self.size)
            mark_step()
            if progress:
                progress.add(min(self.size * self.world.size, rows - first * self.world.size))
            self.between()

    @torch.no_grad()
    def encode_catalog(self, num_items: int, encode: Callable[[IntArray, torch.device], Tensor]) -> Tensor:
        """(N, D) vectors of items 1 to N, complete on every rank; each rank encodes its share."""
        item_N = np.arange(1, num_items + 1)
        mine = item_N[share(num_items, self.world.rank, self.world.size)]
        with Progress("encoding items", num_items, enabled=self.world.is_main) as progress:
            parts = [encode(mine[batch], self.world.device) for batch in self.of(num_items, progress)]
        return self.world.all_gather_results(torch.cat(parts), share_sizes(num_items, self.world.size))


@dataclass(frozen=True)
class StoredCandidates:
    """Stored candidates of the dataset for a task."""

    dataset: Dataset
    task: Task

    def of(self, held_out: HeldOut) -> IntArray:
        """(B, C) item ids to rank, the target first."""
        user_B = held_out.histories.user_U
        of_valid, of_test = (
            self.dataset.candidates_of("title" if self.task == "generation" else "retrieval", split, user_B)
            for split in SPLITS
        )
        is_valid_B1 = held_out.split_B[:, None] == SPLITS.index("valid")
        return np.concatenate([held_out.target_B[:, None], np.where(is_valid_B1, of_valid, of_test)], axis=1)

    def rank(self, score_BC: Tensor, item_BC: IntArray) -> Ranks:
        """Rank each target; in generation, candidates with the target's title count as the target."""
        if self.task == "generation":
            score_BC = merge_same_titles(score_BC, item_BC, self._normalized_titles)
        return rank_candidates(score_BC)

    @cached_property
    def _normalized_titles(self) -> list[str]:
        # Item ids start at 1.
        return ["", *(normalized(title) for title in self.dataset.titles)]


class Ranker(Protocol):
    """Ranks batches with the model's current weights."""

    @property
    def max_history(self) -> int:
        """Number of latest items of a history that the system reads."""

    @property
    def list_length(self) -> int:
        """Items of the catalog that are listed per user; 0: none."""

    @property
    def decodes(self) -> bool:
        """Whether it also decodes answers greedily and scores them."""

    def rank(self, held_out: HeldOut) -> Ranked:
        """Rank one rank's batch, possibly empty."""


@dataclass(frozen=True)
class VectorRanker:
    """Ranks by inner product with item vectors that are encoded once."""

    scoring: VectorScoring[Any, Any]
    stored: StoredCandidates
    candidates: Candidates
    device: torch.device
    item_ND: Tensor
    list_length: int = 0
    """Items to list per user, from the whole catalog; 0: none."""
    decodes: bool = False

    @property
    def max_history(self) -> int:
        """See `Ranker.max_history`."""
        return self.scoring.collator.max_history

    def rank(self, held_out: HeldOut) -> Ranked:
        """See `Ranker.rank`."""
        user_BD, tokens = self.scoring.user_vectors(held_out.histories, self.device)
        if self.candidates == "sampled":
            ranks = self._rank_stored(user_BD, held_out)
            top_BK = np.zeros((len(held_out), 0), np.int64)
            if self.list_length:
                top_BK = self._catalog.top(self._exact(user_BD), self._excluded(held_out), self.list_length)
        else:
            target_B = self._exact(torch.from_numpy(held_out.target_B))
            ranks, top_BK = self._catalog.rank(
                self._exact(user_BD), target_B, self._excluded(held_out), self.list_length
            )
        return Ranked(ranks, np.zeros((2, len(held_out)), np.int64), top_BK, tokens)

    def _rank_stored(self, user_BD: Tensor, held_out: HeldOut) -> Ranks:
        item_BC = self.stored.of(held_out)
        candidate_BCD = self.item_ND[torch.from_numpy(item_BC - 1).to(self.item_ND.device)]
        return self.stored.rank(torch.einsum("bd,bcd->bc", user_BD, candidate_BCD), item_BC)

    def _excluded(self, held_out: HeldOut) -> list[IntArray]:
        """Items that are neither ranked against the target nor listed, per user."""
        histories = held_out.histories
        if self.candidates == "full_with_seen":
            return [np.zeros(0, np.int64)] * len(held_out)
        bounds = zip(histories.offset_U1[:-1], histories.offset_U1[1:], strict=True)
        return [histories.item_E[start:end] for start, end in bounds]

    @cached_property
    def _catalog(self) -> Catalog:
        return Catalog.of(self._exact(self.item_ND))

    def _exact(self, tensor: Tensor) -> Tensor:
        return tensor.to(float64_device(self.device))


@dataclass(frozen=True)
class TitleRanker:
    """Ranks candidates by the likelihood of their titles."""

    scoring: TitleScoring
    stored: StoredCandidates
    device: torch.device
    decodes: bool
    list_length: int = 0

    @property
    def max_history(self) -> int:
        """See `Ranker.max_history`."""
        return self.scoring.collator.max_history

    def rank(self, held_out: HeldOut) -> Ranked:
        """See `Ranker.rank`."""
        model, collator = self.scoring.model, self.scoring.collator
        item_BC = self.stored.of(held_out)
        batch = collator.choices(held_out.histories, item_BC)
        scores = model.compare(to_device(batch, self.device))
        judged_2B = np.zeros((2, len(held_out)), np.int64)
        if self.decodes:
            judged_2B = np.stack(
                judge_greedy(model, collator, held_out.histories, item_BC, scores.greedy_BC, self.device)
            )
        nothing_BK = np.zeros((len(held_out), 0), np.int64)
        return Ranked(self.stored.rank(scores.score_BC, item_BC), judged_2B, nothing_BK, batch.useful_tokens)
