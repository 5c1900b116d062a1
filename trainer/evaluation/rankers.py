"""Ranking batches of held-out items for fixed weights: by vectors, or by the likelihood of titles.

Letters: B users of a batch, C candidates, D width of the vectors, N items of the catalog.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, get_args

import numpy as np
import torch
from torch import Tensor

from trainer.config import Split, Task
from trainer.data.collators.base import to_device
from trainer.data.reading.counter_rng import IntArray
from trainer.data.reading.dataset import Dataset
from trainer.data.reading.histories import Histories
from trainer.device import mark_step
from trainer.distributed import World
from trainer.evaluation.ranking import Ranks, concatenate, rank_candidates, rank_catalog
from trainer.evaluation.titles import judge_greedy, merge_same_titles, normalized
from trainer.models.scoring import TitleScoring, VectorScoring
from trainer.runs.batch_shares import share, share_sizes

SPLITS: tuple[Split, ...] = get_args(Split)
"""A user's history in one is the beginning of that in the next."""


@dataclass(frozen=True)
class HeldOut:
    """Histories and the item that follows each; a user's stand together."""

    histories: Histories
    target_B: IntArray
    split_B: IntArray
    """Places in `SPLITS`."""

    def __len__(self) -> int:
        return len(self.histories)

    def take(self, rows: IntArray | slice) -> HeldOut:
        """Some of them, in this order."""
        return HeldOut(self.histories.take(rows), self.target_B[rows], self.split_B[rows])


@dataclass(frozen=True)
class Ranked:
    """Held-out items ranked."""

    ranks: Ranks
    judged_2B: IntArray
    """Whether the greedily decoded answer is right, and whether it is valid; zeros where nothing was decoded."""
    tokens: int
    """LLM tokens of the prompts; 0 without an LLM."""

    @staticmethod
    def concatenate(parts: Sequence[Ranked]) -> Ranked:
        """The users of all parts, in order."""
        return Ranked(
            concatenate(part.ranks for part in parts),
            np.concatenate([np.zeros((2, 0), np.int64), *(part.judged_2B for part in parts)], axis=1),
            sum(part.tokens for part in parts),
        )


@dataclass(frozen=True)
class Batches:
    """How a rank goes through its share, in step with the others."""

    world: World
    size: int
    between: Callable[[], None]
    """Called between batches, as often on every rank; what it raises ends the evaluation."""

    def of(self, rows: int) -> Iterator[slice]:
        """Slices of this rank's share of `rows`.

        The same number on every rank, some perhaps empty: ZeRO-3 gathers weights in step.
        """
        for first in range(0, max([*share_sizes(rows, self.world.size), 1]), self.size):
            yield slice(first, first + self.size)
            mark_step()
            self.between()

    @torch.no_grad()
    def encode_catalog(self, num_items: int, encode: Callable[[IntArray, torch.device], Tensor]) -> Tensor:
        """(N, D) vectors of items 1 to N, whole on every rank; each rank encodes its share."""
        item_N = np.arange(1, num_items + 1)
        mine = item_N[share(num_items, self.world.rank, self.world.size)]
        parts = [encode(mine[batch], self.world.device) for batch in self.of(num_items)]
        return self.world.gather_rows(torch.cat(parts), share_sizes(num_items, self.world.size))


@dataclass(frozen=True)
class StoredCandidates:
    """The dataset's stored candidates for a task."""

    dataset: Dataset
    task: Task

    def of(self, held_out: HeldOut) -> IntArray:
        """(B, C) items to rank, the target first."""
        user_B = held_out.histories.user_U
        of_valid, of_test = (
            self.dataset.candidates("title" if self.task == "generation" else "retrieval", split)[user_B]
            for split in SPLITS
        )
        is_valid_B1 = held_out.split_B[:, None] == SPLITS.index("valid")
        return np.concatenate([held_out.target_B[:, None], np.where(is_valid_B1, of_valid, of_test)], axis=1)

    def rank(self, score_BC: Tensor, item_BC: IntArray) -> Ranks:
        """Where each target stands; in generation, candidates with the target's title count as the target."""
        if self.task == "generation":
            score_BC = merge_same_titles(score_BC, item_BC, self._normalized_titles)
        return rank_candidates(score_BC)

    @cached_property
    def _normalized_titles(self) -> list[str]:
        return ["", *(normalized(title) for title in self.dataset.titles)]


class Ranker(Protocol):
    """Ranks batches with the weights that the model has now."""

    @property
    def max_history(self) -> int:
        """Items of a history that the system reads, the latest ones."""

    @property
    def decodes(self) -> bool:
        """Whether it also decodes answers greedily and judges them."""

    def rank(self, held_out: HeldOut) -> Ranked:
        """One rank's batch, perhaps empty."""


@dataclass(frozen=True)
class VectorRanker:
    """Ranks by inner product with item vectors that were encoded once."""

    scoring: VectorScoring[Any, Any]
    candidates: StoredCandidates
    full_catalog: bool
    """Rank all items that are not in the history instead of the stored candidates."""
    device: torch.device
    item_ND: Tensor
    decodes: bool = False

    @property
    def max_history(self) -> int:
        """See `Ranker.max_history`."""
        return self.scoring.collator.max_history

    def rank(self, held_out: HeldOut) -> Ranked:
        """See `Ranker.rank`."""
        histories = held_out.histories
        user_BD, tokens = self.scoring.user_vectors(histories, self.device)
        if self.full_catalog:
            bounds = zip(histories.offset_U1[:-1], histories.offset_U1[1:], strict=True)
            seen = [histories.item_E[a:b] for a, b in bounds]
            ranks = rank_catalog(user_BD, self.item_ND, torch.from_numpy(held_out.target_B).to(user_BD.device), seen)
        else:
            item_BC = self.candidates.of(held_out)
            candidate_BCD = self.item_ND[torch.from_numpy(item_BC - 1).to(self.item_ND.device)]
            ranks = self.candidates.rank(torch.einsum("bd,bcd->bc", user_BD, candidate_BCD), item_BC)
        return Ranked(ranks, np.zeros((2, len(held_out)), np.int64), tokens)


@dataclass(frozen=True)
class TitleRanker:
    """Ranks by the likelihood of titles."""

    scoring: TitleScoring
    candidates: StoredCandidates
    device: torch.device
    decodes: bool

    @property
    def max_history(self) -> int:
        """See `Ranker.max_history`."""
        return self.scoring.collator.max_history

    def rank(self, held_out: HeldOut) -> Ranked:
        """See `Ranker.rank`."""
        model, collator = self.scoring.model, self.scoring.collator
        item_BC = self.candidates.of(held_out)
        batch = collator.choices(held_out.histories, item_BC)
        scores = model.compare(to_device(batch, self.device))
        judged_2B = np.zeros((2, len(held_out)), np.int64)
        if self.decodes:
            judged_2B = np.stack(
                judge_greedy(model, collator, held_out.histories, item_BC, scores.greedy_BC, self.device)
            )
        return Ranked(self.candidates.rank(scores.score_BC, item_BC), judged_2B, batch.useful_tokens)
