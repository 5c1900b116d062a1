"""Ranking by popularity: what a system must beat to have learned anything about users.

Letters: T targets of all users, B held-out items of a group, C candidates, N items and padding.
"""

from __future__ import annotations

import numpy as np

from trainer.config import Candidates, Split
from trainer.data.reading.dataset import Dataset
from trainer.data.reading.histories import Histories
from trainer.data.reading.shards import read_in_order
from trainer.evaluation.ranking import Ints, Ranks, concatenate

RECENT_DAYS = 7
_DAY_MS = 86_400_000
_NUMBERS_AT_ONCE = 1 << 24
"""Counts of candidates, and events of histories, that are held at a time."""


def popularity_ranks(
    dataset: Dataset, split: Split, candidates: Candidates, days: int | None = None
) -> tuple[Ints, Ranks]:
    """Index of the user (T,) of each target of the split, and the target's rank by the number of training events per
    item.

    Args:
        days: count the last days of training only. Recent popularity is the stronger baseline after a temporal split
            (gh:blondered/transformer_benchmark); leave-one-out splits have no common end of training.
        candidates: `sampled`: among the stored negatives; `full`: among all items outside the user's history;
            `full_with_seen`: among all items.
    """
    groups = list(read_in_order(dataset.path, dataset.manifest))
    end = max((int(users.train.time_E.max(initial=0)) for users in groups), default=0)
    count_N = np.zeros(dataset.num_items + 1, np.int64)
    for users in groups:
        item_E = users.train.item_E
        if days is not None:
            item_E = item_E[users.train.time_E > end - days * _DAY_MS]
        count_N += np.bincount(item_E, minlength=len(count_N))
    user_parts, rank_parts = [], []
    width = dataset.manifest.negatives if candidates == "sampled" else dataset.num_items
    rows = max(_NUMBERS_AT_ONCE // width, 1)
    for users in (block for group in groups for block in group.in_blocks(_NUMBERS_AT_ONCE)):
        histories, target_B = users.targets(split)
        user_parts.append(histories.user_U)
        for start in range(0, len(histories), rows):
            block = slice(start, start + rows)
            rank_parts.append(_ranks(dataset, split, candidates, histories.take(block), target_B[block], count_N))
    return np.concatenate(user_parts), concatenate(rank_parts)


def _ranks(
    dataset: Dataset, split: Split, candidates: Candidates, histories: Histories, target_B: Ints, count_N: Ints
) -> Ranks:
    target_B1 = count_N[target_B][:, None]
    if candidates == "sampled":
        other_BC = count_N[dataset.candidates_of("retrieval", split, histories.user_U)]
    else:
        other_BC = np.tile(count_N[1:], (len(histories), 1))
        if candidates == "full":
            row_E = np.repeat(np.arange(len(histories)), histories.length_U)
            other_BC[row_E, histories.item_E - 1] = -1  # not ranked
        other_BC[np.arange(len(histories)), target_B - 1] = -1
    return Ranks(
        greater=(other_BC > target_B1).sum(1),
        ties=(other_BC == target_B1).sum(1),
        candidates=(other_BC >= 0).sum(1) + 1,
    )
