"""Counts of a dataset's training sequences, for metrics beyond accuracy.

Letters: E events, N items of the catalog, X pairs of a user and an item; a `1` is the entry of padding.
"""

from __future__ import annotations

import numpy as np

from trainer.data.reading.dataset import Dataset
from trainer.data.reading.histories import Histories
from trainer.data.reading.shards import read_in_order
from trainer.evaluation.beyond import TrainingFacts
from trainer.evaluation.ranking import Ints


def training_facts(dataset: Dataset) -> TrainingFacts:
    """Count the training sequences of a dataset; reads it twice, a group of shards at a time."""
    event_1N, user_1N = np.zeros((2, dataset.num_items + 1), np.int64)
    users, test_times = 0, []
    for group in read_in_order(dataset.path, dataset.manifest):
        event_1N += np.bincount(group.train.item_E, minlength=len(event_1N))
        user_1N += _distinct_users(group.train, dataset.num_items)
        users += int((group.train.length_U > 0).sum())
        test_times.append(group.test_time_U[group.test_item_U > 0])
    times = np.concatenate(test_times)
    later_share = None
    if len(times):
        median = float(np.median(times))
        later = sum(int((g.train.time_E > median).sum()) for g in read_in_order(dataset.path, dataset.manifest))
        later_share = later / max(int(event_1N.sum()), 1)
    return TrainingFacts(event_1N, user_1N, users, later_share)


def _distinct_users(train: Histories, num_items: int) -> Ints:
    row_E = np.repeat(np.arange(len(train)), train.length_U)
    # Sorted and compared, because np.unique hashes, which is far slower for many keys.
    key_E = np.sort(row_E * (num_items + 1) + train.item_E)
    item_X = key_E[np.diff(key_E, prepend=-1) > 0] % (num_items + 1)
    count_1N: Ints = np.bincount(item_X, minlength=num_items + 1)
    return count_1N
