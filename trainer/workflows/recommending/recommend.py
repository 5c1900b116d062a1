"""Recommend items after histories.

Letters: B histories, K recommended items, C candidates, N items of the catalog, D width of the vectors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trainer.data.raw.items import RawItems
from trainer.data.reading.counter_rng import IntArray
from trainer.data.reading.histories import Histories
from trainer.device import float64_device
from trainer.evaluation.catalog import Catalog
from trainer.models.scoring import VectorScoring
from trainer.workflows.answers import days
from trainer.workflows.recommending.asking import Asked


@dataclass(frozen=True)
class SeenItem:
    """An item of a history, with the day (YYYY-MM-DD) of its event."""

    item_id: str | None
    """Raw item id; None for a title that is not in the catalog."""
    title: str
    date: str | None
    """None if the time is not known."""


@dataclass(frozen=True)
class Recommendation:
    """A recommended item; rank 1 is the best."""

    rank: int
    item_id: str
    """Raw item id."""
    title: str
    score: float


@dataclass(frozen=True)
class Recommendations:
    """A system's recommendations after one history."""

    user_id: str | None
    """Raw user id, or the name that came with the history; None without one."""
    history: list[SeenItem]
    """The latest items that the system read, oldest first."""
    recommendations: list[Recommendation]


@dataclass(frozen=True)
class Recommender:
    """Ranks items after histories, by inner product with item vectors."""

    scoring: VectorScoring[Any, Any]
    items: RawItems
    item_ND: Tensor
    """Vectors of items 1 to N."""
    device: torch.device
    batch_size: int
    """Histories that are encoded at a time."""
    new_titles: Sequence[str] = ()
    """Titles of items N + 1, N + 2, ..., which histories may hold and which are never recommended."""
    candidates: IntArray | None = None
    """Items to rank, ascending; None: all."""

    @torch.no_grad()
    def recommend(self, asked: Asked, k: int = 10, *, exclude_seen: bool = True) -> Iterator[Recommendations]:
        """The `k` best items after each history, in order; equal scores by the position in the catalog.

        Args:
            exclude_seen: leave out every item of the history, also those that the system did not read.

        Raises:
            ValueError: a vector is not finite.
        """
        for first in range(0, len(asked), self.batch_size):
            yield from self._answers(asked.take(slice(first, first + self.batch_size)), k, exclude_seen)

    @torch.no_grad()
    def user_vectors(self, asked: Asked) -> npt.NDArray[np.float32]:
        """(B, D) vectors of histories."""
        batches = (slice(first, first + self.batch_size) for first in range(0, len(asked), self.batch_size))
        parts = [self.scoring.user_vectors(asked.take(b).histories, self.device).vector_BD for b in batches]
        vector_BD: npt.NDArray[np.float32] = torch.cat(parts).cpu().numpy()
        return vector_BD

    def _answers(self, asked: Asked, k: int, exclude_seen: bool) -> Iterator[Recommendations]:
        histories = asked.histories
        user_BD = self.scoring.user_vectors(histories, self.device).vector_BD
        item_BK, score_BK = self._catalog.best(
            user_BD.to(float64_device(self.device)), self._left_out(histories, exclude_seen), k
        )
        shown = histories.last(self.scoring.collator.max_history)
        day_E = days(shown)
        for row, (item_K, score_K) in enumerate(zip(item_BK, score_BK, strict=True)):
            events = range(shown.offset_U1[row], shown.offset_U1[row + 1])
            yield Recommendations(
                asked.user_ids[row],
                [self._seen(int(shown.item_E[e]), day_E[e] if asked.dated_U[row] else None) for e in events],
                [
                    self._recommendation(rank, int(self._ranked_C[index - 1]), float(score))
                    for rank, (index, score) in enumerate(zip(item_K, score_K, strict=True), 1)
                    if index
                ],
            )

    def _left_out(self, histories: Histories, exclude_seen: bool) -> list[IntArray]:
        """Positions of seen items among the candidates, from 1, per history."""
        if not exclude_seen:
            return [np.zeros(0, np.int64)] * len(histories)
        # By binary search: comparing each catalog with each history would cost more than the scores.
        place_E = np.searchsorted(self._ranked_C, histories.item_E)
        ranked_E = self._ranked_C[np.minimum(place_E, len(self._ranked_C) - 1)] == histories.item_E
        bounds = zip(histories.offset_U1[:-1], histories.offset_U1[1:], strict=True)
        return [1 + place_E[first:end][ranked_E[first:end]] for first, end in bounds]

    def _seen(self, item: int, day: str | None) -> SeenItem:
        if item > len(self.items):
            return SeenItem(None, self.new_titles[item - len(self.items) - 1], day)
        return SeenItem(self.items.ids[item - 1], self.items.titles[item - 1], day)

    def _recommendation(self, rank: int, item: int, score: float) -> Recommendation:
        return Recommendation(rank, self.items.ids[item - 1], self.items.titles[item - 1], round(score, 4))

    @cached_property
    def _ranked_C(self) -> IntArray:
        """Items that are ranked, ascending."""
        return np.arange(1, len(self.items) + 1) if self.candidates is None else self.candidates

    @cached_property
    def _catalog(self) -> Catalog:
        row_C = torch.from_numpy(self._ranked_C - 1).to(self.item_ND.device)
        return Catalog.of(self.item_ND[row_C].to(float64_device(self.device)))
