"""Facts that tell whether order can matter in a dataset, before a model is trained.

Sequential rules are those of Klenitskiy et al., *Does It Look Sequential?* (RecSys'24): n-grams of items that occur
more than 5 times and follow their first n - 1 items in at least 10 % of cases. Where shuffling each user's items
destroys them, order carries information. A first-order Markov chain, the simplest model that reads order, then shows
how much of it reaches the test items.

n-grams are counted in parts, by a hash of their first item, so that memory does not grow with the dataset.

Letters: U users, E events, G n-grams, N items and padding, K length of a list.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from shards.manifest import Manifest
from shards.splitmix import mix
from shards.stored.users import Ints, StoredUsers, read_stored

_SUPPORT = 5
"""An n-gram must occur more often than this."""
_LENGTH = 10
"""Items per list of the chain."""
_PART_EVENTS = 8_000_000
"""Events per part: about 1.2 GB; 3 million take 0.6 GB."""
_SEED = 17


@dataclass(frozen=True)
class Pair:
    """A number for the original and for the shuffled order."""

    original: float
    shuffled: float

    @property
    def ratio(self) -> float | None:
        """Shuffled divided by original; None if the original is 0."""
        return self.shuffled / self.original if self.original else None


@dataclass(frozen=True)
class OrderFacts:
    """What order means in a dataset."""

    rules_2: Pair
    """Sequential rules of two items."""
    rules_3: Pair
    chain_hit_rate: Pair
    """HR@10 on test items of the ten most frequent successors, in training, of the last item of the history. Items of
    the history are not left out; popular items fill up."""
    popular_hit_rate: float
    """HR@10 of the ten most popular items of training."""
    chain_jaccard: float
    """Mean Jaccard@10 of the chain's lists for original and shuffled histories."""
    later_training: float | None
    """Share of training events later than the median test event; None without test items."""


def order_facts(directory: Path, manifest: Manifest) -> OrderFacts:
    """Read a dataset a few times and measure it.

    Raises:
        DatasetError: a shard is damaged.
    """
    parts = max(1, -(-manifest.statistics.interactions // _PART_EVENTS))
    rules = np.zeros((2, 2), np.int64)  # order x length
    successor_NK = np.zeros((manifest.num_items + 1, _LENGTH), np.int64)
    popularity_N, tests = _first_pass(directory, manifest)
    popular_K = np.argsort(-popularity_N, kind="stable")[:_LENGTH]
    popular_K = np.pad(popular_K[popularity_N[popular_K] > 0], (0, _LENGTH))[:_LENGTH]
    for part in range(parts):
        original, shuffled, training = [], [], []
        for users in read_stored(directory, manifest):
            original.append(_windows(users, users.item_E, part, parts))
            shuffled.append(_windows(users, users.shuffled_items(_SEED), part, parts))
            training.append(_windows(users, users.item_E, part, parts, training=True))
        for order, windows in enumerate((original, shuffled)):
            rules[order] += _count_rules(np.concatenate(windows, axis=1), manifest.num_items)
        _fill_successors(successor_NK, np.concatenate(training, axis=1), popular_K)
    never = successor_NK[:, 0] == 0
    successor_NK[never] = popular_K
    first_UK, second_UK = successor_NK[tests.last_U], successor_NK[tests.shuffled_last_U]
    target_U1 = tests.target_U[:, None]
    return OrderFacts(
        Pair(int(rules[0, 0]), int(rules[1, 0])),
        Pair(int(rules[0, 1]), int(rules[1, 1])),
        Pair(_mean((first_UK == target_U1).any(1)), _mean((second_UK == target_U1).any(1))),
        _mean(np.isin(tests.target_U, popular_K[popular_K > 0])),
        _mean(_jaccard(first_UK, second_UK)),
        _later_training(directory, manifest, tests.time_U),
    )


@dataclass(frozen=True)
class _Tests:
    target_U: Ints
    time_U: Ints
    last_U: Ints
    """Item before the target."""
    shuffled_last_U: Ints
    """Item before the target if the history is shuffled."""


def _first_pass(directory: Path, manifest: Manifest) -> tuple[Ints, _Tests]:
    """Training events per item id, and the users with a test item."""
    popularity_N = np.zeros(manifest.num_items + 1, np.int64)
    columns = []
    for users in read_stored(directory, manifest):
        in_training_E = users.position_E < users.train_U[users.row_E]
        popularity_N += np.bincount(users.item_E[in_training_E], minlength=len(popularity_N))
        end_U = users.offset_U1[1:][users.has_test_U & (np.diff(users.offset_U1) > 1)]
        shuffled_E = users.shuffled_items(_SEED, keep_last=True)
        columns.append(
            np.stack([users.item_E[end_U - 1], users.time_E[end_U - 1], users.item_E[end_U - 2], shuffled_E[end_U - 2]])
        )
    return popularity_N, _Tests(*np.concatenate(columns, axis=1))


def _windows(users: StoredUsers, item_E: Ints, part: int, parts: int, *, training: bool = False) -> Ints:
    """(3, G) each event of a part of the items, and the two events after it; 0 behind the end of a history.

    Args:
        training: histories end with the training sequence.
    """
    length_U = users.train_U if training else np.diff(users.offset_U1)
    row_E, position_E = users.row_E, users.position_E
    left_E = length_U[row_E] - position_E
    chosen_G = np.flatnonzero((left_E > 0) & (mix(item_E.astype(np.uint64)) % np.uint64(parts) == part))
    padded_E = np.concatenate([item_E, [0, 0]])
    return np.stack([item_E[chosen_G], *(np.where(left_E[chosen_G] > n, padded_E[chosen_G + n], 0) for n in (1, 2))])


def _count_rules(window_3G: Ints, num_items: int) -> tuple[int, int]:
    """Rules of two and of three items; all n-grams that begin with an item must be in the windows."""
    stride = num_items + 1
    single_N = np.bincount(window_3G[0], minlength=stride)
    window_3G = window_3G[:, window_3G[1] > 0]
    pair_G, pair_count = _group(window_3G[0] * stride + window_3G[1])
    # Below, an n-gram is its first window.
    rules_2 = _is_rule(pair_count, single_N[window_3G[0][_first(pair_G)]])
    whole = window_3G[2] > 0
    # A pair's index instead of its items, because three items may exceed 64 bits.
    triple_G, triple_count = _group(pair_G[whole] * stride + window_3G[2][whole])
    rules_3 = _is_rule(triple_count, pair_count[pair_G[whole][_first(triple_G)]])
    return int(rules_2.sum()), int(rules_3.sum())


def _is_rule(count_G: Ints, prefix_G: Ints) -> npt.NDArray[np.bool_]:
    # Confidence in whole numbers: count / prefix >= 0.1 without rounding.
    return (count_G > _SUPPORT) & (10 * count_G >= prefix_G)


def _fill_successors(successor_NK: Ints, window_3G: Ints, popular_K: Ints) -> None:
    """Write the most frequent successors of each item, equal counts by id, filled up with popular items."""
    window_3G = window_3G[:, window_3G[1] > 0]
    stride = len(successor_NK)
    group_G, count_X = _group(window_3G[0] * stride + window_3G[1])
    place_X = _first(group_G)
    from_X, to_X = window_3G[0][place_X], window_3G[1][place_X]
    order = np.lexsort((to_X, -count_X, from_X))
    from_X, to_X = from_X[order], to_X[order]
    start_X = np.flatnonzero(np.diff(from_X, prepend=-1))
    rank_X = np.arange(len(from_X)) - np.repeat(start_X, np.diff(np.append(start_X, len(from_X))))
    kept = rank_X < _LENGTH
    successor_NK[from_X[kept], rank_X[kept]] = to_X[kept]
    for item in np.unique(from_X[start_X]):
        known_K = successor_NK[item][successor_NK[item] > 0]
        if len(known_K) < _LENGTH:
            more_K = popular_K[(popular_K > 0) & ~np.isin(popular_K, known_K)][: _LENGTH - len(known_K)]
            successor_NK[item, len(known_K) : len(known_K) + len(more_K)] = more_K


def _group(key_G: Ints) -> tuple[Ints, Ints]:
    """Index of each key among the distinct ones, ascending, and how often each of these occurs."""
    order = np.argsort(key_G, kind="stable")
    index_G = np.empty(len(key_G), np.int64)
    index_G[order] = np.cumsum(np.diff(key_G[order], prepend=-1) > 0) - 1
    return index_G, np.bincount(index_G)


def _first(index_G: Ints) -> Ints:
    """For each index from 0 on, a place where it occurs."""
    place = np.empty(int(index_G.max(initial=-1)) + 1, np.int64)
    place[index_G] = np.arange(len(index_G))
    return place


def _jaccard(first_UK: Ints, second_UK: Ints) -> npt.NDArray[np.float64]:
    overlap_U = ((first_UK[:, :, None] == second_UK[:, None, :]) & (first_UK > 0)[:, :, None]).sum((1, 2))
    union_U = (first_UK > 0).sum(1) + (second_UK > 0).sum(1) - overlap_U
    return np.where(union_U > 0, overlap_U / np.maximum(union_U, 1), 1.0)


def _later_training(directory: Path, manifest: Manifest, test_time_U: Ints) -> float | None:
    if not len(test_time_U):
        return None
    median, later, total = float(np.median(test_time_U)), 0, 0
    for users in read_stored(directory, manifest):
        in_training_E = users.position_E < users.train_U[users.row_E]
        later += int((users.time_E[in_training_E] > median).sum())
        total += int(in_training_E.sum())
    return later / max(total, 1)


def _mean(values: npt.NDArray[np.generic]) -> float:
    return float(values.astype(np.float64).mean()) if len(values) else 0.0
