"""Recommend items to a user of a run's dataset."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from trainer.data.reading.dataset import find_user
from trainer.data.reading.histories import Histories
from trainer.data.reading.shards import read_user
from trainer.workflows.answers import days
from trainer.workflows.load_run import LoadedRun


@dataclass(frozen=True)
class SeenItem:
    """An item of the user's history, with the day (YYYY-MM-DD) of its event."""

    date: str
    title: str


@dataclass(frozen=True)
class Recommendation:
    """An item that the user has not seen; rank 1 is the best."""

    rank: int
    item: int
    """Item id, 1 to N."""
    title: str
    score: float


@dataclass(frozen=True)
class Recommendations:
    """The latest items that the system read, oldest first, and the items that it recommends."""

    user: str
    """Raw user id."""
    history: list[SeenItem]
    recommendations: list[Recommendation]


@torch.no_grad()
def recommend(run: LoadedRun, raw_user: str, top: int = 10) -> Recommendations:
    """The `top` items with the highest scores that are not in the user's history.

    Args:
        raw_user: raw user id, as in the reviews.

    Raises:
        ValueError: an unknown user, or a system that has no vectors because it only scores given titles.
    """
    scoring, dataset, device = run.system.vectors, run.dataset, run.evaluator.world.device
    user = find_user(dataset.path, raw_user)
    history = read_user(dataset.path, dataset.manifest, user, dataset.repeat_dates)
    score_N = (run.item_vectors @ scoring.user_vectors(history, device).vector_BD[0]).cpu().numpy()
    score_N[np.unique(history.item_E) - 1] = -np.inf  # of the whole history, also the part that the system did not read
    best = np.argsort(-score_N, kind="stable")[:top]  # equal scores in order of item ids
    best = best[np.isfinite(score_N[best])]
    return Recommendations(
        user=raw_user,
        history=_shown(history.last(scoring.collator.max_history), dataset.titles),
        recommendations=[
            Recommendation(rank, int(row) + 1, dataset.titles[row], round(float(score_N[row]), 4))
            for rank, row in enumerate(best, 1)
        ],
    )


def _shown(history: Histories, titles: tuple[str, ...]) -> list[SeenItem]:
    return [SeenItem(day, titles[item - 1]) for item, day in zip(history.item_E, days(history), strict=True)]
