"""Whether two systems differ, from the metrics of the same users: paired tests, and intervals of a relative change.

Letters: U users, S resamples, K tests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from trainer.evaluation.ranking import Estimate, Floats

_CHUNK = 1 << 24
"""Signs that are drawn at once."""


def sign_flip_p(first_U: Floats, second_U: Floats, seed: int = 0, resamples: int = 10_000) -> float:
    """Two-sided p-value that the mean difference of two systems over the same users is 0, by a permutation test.

    If the systems did not differ, each user's difference could as well have the other sign. The p-value is the share of
    random sign patterns, the observed one counted, whose mean is at least as far from 0; so it is at least
    1 / (resamples + 1). 28,000 users take about three seconds.

    Raises:
        ValueError: different numbers of users, or none.
    """
    if first_U.shape != second_U.shape or not len(first_U):
        raise ValueError(f"a paired test needs the same users, at least one: got {len(first_U)} and {len(second_U)}")
    difference_U = first_U - second_U
    difference_U = difference_U[difference_U != 0]  # a difference of 0 has no sign
    if not len(difference_U):
        return 1.0
    observed = abs(difference_U.sum())
    rng = np.random.default_rng(seed)
    size = max(1, _CHUNK // len(difference_U))
    extreme = 0
    for first in range(0, resamples, size):
        count = min(size, resamples - first)
        sign_SU = rng.integers(0, 2, (count, len(difference_U)), dtype=np.int8) * 2.0 - 1.0
        # Not equal to the last bit, since terms are added in another order.
        extreme += int((np.abs(sign_SU @ difference_U) >= observed * (1 - 1e-12)).sum())
    return (1 + extreme) / (1 + resamples)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p-values of K tests, adjusted so that the chance of any false finding among them keeps its level (Holm 1979)."""
    adjusted: dict[str, float] = {}
    largest = 0.0
    for place, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def relative_change(
    before_U: Floats, after_U: Floats, seed: int = 0, resamples: int = 1000, level: float = 0.95
) -> Estimate:
    """mean(after) / mean(before) - 1 over the same users, with its percentile bootstrap interval.

    Raises:
        ValueError: different numbers of users, none, or a mean of 0 before, of which nothing is a share.
    """
    if before_U.shape != after_U.shape or not len(before_U):
        raise ValueError(f"a change needs the same users, at least one: got {len(before_U)} and {len(after_U)}")
    if before_U.mean() == 0:
        raise ValueError("the metric is 0 before the change, so that there is no relative change")
    rng = np.random.default_rng(seed)
    found: list[float] = []
    for _ in range(resamples):
        count_U = np.bincount(rng.integers(0, len(before_U), len(before_U)), minlength=len(before_U)).astype(np.float64)
        if before := count_U @ before_U:  # a resample of users without any hit says nothing
            found.append(float(count_U @ after_U / before - 1))
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(after_U.mean() / before_U.mean() - 1), float(low), float(high))


def mean_over_seeds(value_of_seeds: Sequence[Floats]) -> Floats:
    """(U,) each user's mean over runs with different seeds.

    Raises:
        ValueError: the runs have different users.
    """
    if len({value_U.shape for value_U in value_of_seeds}) != 1:
        raise ValueError("runs with different seeds were measured on different users: evaluate them all alike")
    mean_U: Floats = np.mean(np.stack(value_of_seeds), axis=0)
    return mean_U
