"""What systems answer to single users: the rank of the target, and the items that score best.

Letters: B held-out items, C candidates, D width of the vectors, N items of the catalog.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.config import Candidates, HistoryOrder, Split
from trainer.data.reading.counter_rng import IntArray
from trainer.data.reading.dataset import Dataset
from trainer.data.reading.histories import Histories
from trainer.data.reading.shards import read_users
from trainer.models.scoring import VectorScoring


@dataclass(frozen=True)
class Question:
    """Users' histories, and the items that came next."""

    histories: Histories
    target_B: IntArray
    ranked: tuple[IntArray, ...]
    """Item ids to rank per user, the target first."""

    def first(self, number: int) -> Question:
        """The first held-out items."""
        return Question(self.histories.take(slice(number)), self.target_B[:number], self.ranked[:number])


@dataclass(frozen=True)
class Ranked:
    """A system's answer to one user."""

    rank: int
    """Rank of the target, 1 is the best; equal scores count against it."""
    candidates: int
    top: tuple[int, ...]
    """Item ids that score best."""


def questions(dataset: Dataset, split: Split, candidates: Candidates, user_U: IntArray) -> Question:
    """The held-out items of these users in a split, of successive ones the last, ascending by user index; users without
    one are left out.

    Args:
        candidates: `sampled`: rank the stored candidates; `full`: all items outside the history.
    """
    users = read_users(dataset.path, dataset.manifest, user_U).dated(dataset.repeat_dates)
    histories, target_B = users.last_targets().targets(split)
    if candidates == "sampled":
        negative_BC = dataset.candidates_of("retrieval", split, histories.user_U)
        ranked = tuple(np.concatenate([target_B[:, None], negative_BC], axis=1))
    else:
        catalog = np.arange(1, dataset.num_items + 1)
        bounds = zip(histories.offset_U1[:-1], histories.offset_U1[1:], target_B, strict=True)
        ranked = tuple(
            np.concatenate([[target], np.setdiff1d(catalog, [*histories.item_E[first:end], target])])
            for first, end, target in bounds
        )
    return Question(histories, target_B, ranked)


@torch.no_grad()
def answer(
    scoring: VectorScoring[Any, Any],
    item_ND: Tensor,
    asked: Question,
    device: torch.device,
    *,
    top: int,
    history: HistoryOrder = "original",
    seed: int = 0,
) -> list[Ranked]:
    """Answer all questions in one batch, so ask few; collective under ZeRO-3.

    Args:
        item_ND: vectors of items 1 to N.
        top: items to return per user.
        seed: of shuffled histories: `evaluation.seed`.
    """
    histories = asked.histories
    if history == "shuffled":  # as in evaluation: only the items that the system reads
        histories = histories.last(scoring.collator.max_history).shuffled(seed)
    score_BN = (scoring.user_vectors(histories, device).vector_BD @ item_ND.T).float().cpu().numpy()
    answers = []
    for score_N, item_C in zip(score_BN, asked.ranked, strict=True):
        score_C = score_N[item_C - 1]
        best = np.argsort(-score_C, kind="stable")[:top]
        rank = 1 + int(np.sum(score_C[1:] >= score_C[0]))
        answers.append(Ranked(rank, len(item_C), tuple(item_C[best].tolist())))
    return answers


def days(histories: Histories) -> list[str]:
    """Day of each event, as YYYY-MM-DD."""
    day_E = histories.time_E.astype("datetime64[ms]").astype("datetime64[D]").astype(str)
    return [str(day) for day in day_E]
