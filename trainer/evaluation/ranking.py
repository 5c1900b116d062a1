"""From scores to ranks, from ranks to per-user metrics, and from these to an estimate with a confidence interval.

A metric of one held-out item follows from how many items score higher and how many tie with it; a user with several
held-out items has the mean of their metrics. By default ties count as the expectation over their orders: with a sort,
the metrics of a collapsed model, whose scores are all equal, would be an artefact of the sort.

Runs on the device of the given tensors. torch is imported for its types only, so that reports read results without the
cost of importing it.

Letters: B and U users, T held-out items of all users, C candidates, R positions of a ranking, M metrics, S bootstrap
resamples.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import numpy.typing as npt

from trainer.config import Tie

if TYPE_CHECKING:
    from torch import Tensor

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

KS = (1, 5, 10, 20)
METRIC_NAMES = (*(f"HR@{k}" for k in KS), *(f"NDCG@{k}" for k in KS), "MRR")


@dataclass(frozen=True)
class Ranks:
    """The rank of each user's target, as counts of shape (U,)."""

    greater: Ints
    """Items that score strictly higher."""
    ties: Ints
    """Other items with the same score."""
    candidates: Ints
    """Items that are ranked, the target included."""

    def __post_init__(self) -> None:
        assert self.greater.shape == self.ties.shape == self.candidates.shape, "one entry per user in each"
        assert bool(np.all(self.greater + self.ties < self.candidates)), "the target is a candidate too"

    def __len__(self) -> int:
        return len(self.greater)


@dataclass(frozen=True)
class Estimate:
    """Mean over users with its confidence interval."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}  # where results are read

    value: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2


def rank_candidates(score_BC: Tensor) -> Ranks:
    """Rank column 0, the target, among the C candidates of each user, comparing scores in fp32.

    Infinities rank like any other number.

    Raises:
        ValueError: a score is NaN, which would compare false with all others and so look like the best; the message
            names the rows.
    """
    if score_BC.ndim != 2 or score_BC.shape[1] == 0:
        raise ValueError(f"expected scores of shape (users, candidates), got {tuple(score_BC.shape)}")
    score_BC = score_BC.float()
    bad_BC = score_BC.isnan()
    if bool(bad_BC.any()):
        rows = bad_BC.any(dim=1).nonzero().flatten().tolist()
        raise ValueError(
            f"NaN in {int(bad_BC.sum())} of {score_BC.numel()} scores: {_name_rows(rows)} of {len(score_BC)}"
        )
    target_B1, other_BC = score_BC[:, :1], score_BC[:, 1:]
    return Ranks(
        greater=to_numpy((other_BC > target_B1).sum(dim=1)),
        ties=to_numpy((other_BC == target_B1).sum(dim=1)),
        candidates=np.full(len(score_BC), score_BC.shape[1], dtype=np.int64),
    )


def concatenate(parts: Iterable[Ranks]) -> Ranks:
    """Join the users of all parts, in order."""
    parts = list(parts)
    empty = np.zeros(0, dtype=np.int64)
    return Ranks(
        greater=np.concatenate([empty, *(part.greater for part in parts)]),
        ties=np.concatenate([empty, *(part.ties for part in parts)]),
        candidates=np.concatenate([empty, *(part.candidates for part in parts)]),
    )


def metrics_per_target(ranks: Ranks, ks: Sequence[int] = KS, tie: Tie = "expectation") -> dict[str, Floats]:
    """HR@k, NDCG@k and MRR per user, float64 of shape (U,), keyed as in `METRIC_NAMES`.

    With one relevant item at rank r, counted from 0, HR@k is 1[r < k], NDCG@k is 1[r < k] / log2(r + 2) and MRR is
    1 / (r + 1).

    Args:
        tie: rank of a target with g items above it and t tied with it: "expectation" averages over g..g+t,
            "optimistic" takes g, "pessimistic" g+t.

    Raises:
        ValueError: an unknown `tie`, or a cut-off below 1.
    """
    if tie not in ("expectation", "optimistic", "pessimistic"):
        raise ValueError(f"tie must be expectation, optimistic or pessimistic, not {tie!r}")
    if any(k < 1 for k in ks):
        raise ValueError(f"cut-offs must be at least 1, not {tuple(ks)}")
    best_U, worst_U = ranks.greater, ranks.greater + ranks.ties
    if tie == "optimistic":
        worst_U = best_U
    elif tie == "pessimistic":
        best_U = worst_U
    rank_R = np.arange(int(worst_U.max(initial=0)) + 1, dtype=np.float64)
    discount_R: Floats = 1.0 / np.log2(rank_R + 2.0)
    gain: dict[str, Floats] = {f"HR@{k}": (rank_R < k).astype(np.float64) for k in ks}
    gain |= {f"NDCG@{k}": np.where(rank_R < k, discount_R, 0.0) for k in ks}
    gain["MRR"] = 1.0 / (rank_R + 1.0)
    return {name: _mean_gain(gain_R, best_U, worst_U) for name, gain_R in gain.items()}


def mean_per_user(user_T: Ints, value_T: Floats) -> Floats:
    """(U,) mean of each user's values; users in ascending order, as in `user_T`."""
    start_U = np.flatnonzero(np.diff(user_T, prepend=-1))
    if len(start_U) == len(user_T):  # exact, where every user has one
        return value_T
    means: Floats = np.add.reduceat(value_T, start_U) / np.diff(np.append(start_U, len(user_T)))
    return means


def chance(num_candidates: int, ks: Sequence[int] = KS) -> dict[str, float]:
    """Metrics of a model that scores all candidates alike.

    Raises:
        ValueError: `num_candidates` is below 1.
    """
    if num_candidates < 1:
        raise ValueError(f"expected at least one candidate, got {num_candidates}")
    all_tied = Ranks(np.array([0]), np.array([num_candidates - 1]), np.array([num_candidates]))
    return {name: float(value_U[0]) for name, value_U in metrics_per_target(all_tied, ks).items()}


def bootstrap(values_U: Floats, seed: int, resamples: int = 1000, level: float = 0.95) -> Estimate:
    """Mean of `values_U` with its percentile bootstrap interval over users; raises as `bootstrap_all`."""
    return bootstrap_all({"": values_U}, seed, resamples, level)[""]


def bootstrap_all(
    metrics: Mapping[str, Floats], seed: int, resamples: int = 1000, level: float = 0.95
) -> dict[str, Estimate]:
    """`bootstrap` of several metrics on the same resamples of users, so that they stay comparable.

    An entry does not depend on which other metrics are passed. 1e5 users, 9 metrics, 1000 resamples: about 1 s.

    Raises:
        ValueError: no users, different numbers of users, NaN, a level outside (0, 1), or no resamples.
    """
    if not metrics:
        return {}
    if not 0.0 < level < 1.0 or resamples < 1:
        raise ValueError(f"need 0 < level < 1 and resamples >= 1, got level {level} and {resamples} resamples")
    lengths = {name: len(values_U) for name, values_U in metrics.items()}
    num_users = next(iter(lengths.values()))
    if num_users == 0 or set(lengths.values()) != {num_users}:
        raise ValueError(f"every metric needs a value for each of the same users, at least one; got {lengths}")
    value_UM = np.stack([np.asarray(values_U, dtype=np.float64) for values_U in metrics.values()], axis=1)
    for name, broken in zip(metrics, np.isnan(value_UM).sum(axis=0), strict=True):
        if broken:
            raise ValueError(f"{name or 'the metric'} is NaN for {broken} of {num_users} users")
    rng = np.random.default_rng(seed)
    mean_SM = np.empty((resamples, len(metrics)))
    for resample in range(resamples):
        # How often each user is drawn: one matrix product then gives all metrics.
        count_U = np.bincount(rng.integers(0, num_users, num_users), minlength=num_users)
        mean_SM[resample] = count_U.astype(np.float64) @ value_UM / num_users
    low_M, high_M = np.quantile(mean_SM, [(1 - level) / 2, (1 + level) / 2], axis=0)
    value_M = value_UM.mean(axis=0)
    return {name: Estimate(float(value_M[m]), float(low_M[m]), float(high_M[m])) for m, name in enumerate(metrics)}


def _mean_gain(gain_R: Floats, best_U: Ints, worst_U: Ints) -> Floats:
    """Mean of `gain_R` over each user's ranks best..worst, from differences of its cumulative sum."""
    running_R = np.concatenate(([0.0], np.cumsum(gain_R)))
    mean_U = (running_R[worst_U + 1] - running_R[best_U]) / (worst_U - best_U + 1)
    # A difference of cumulative sums has rounding errors; a rank without ties takes its gain as is.
    return np.where(best_U == worst_U, gain_R[best_U], mean_U)


def check_finite(x: Tensor, name: str) -> None:
    """Check vectors (rows); raises ValueError naming the rows with NaN or infinity."""
    bad = (~x.isfinite()).any(dim=1)
    if bool(bad.any()):
        rows = bad.nonzero().flatten().tolist()
        raise ValueError(f"NaN or infinity in the {name} vectors: {_name_rows(rows)} of {len(x)}")


def _name_rows(rows: list[int]) -> str:
    shown = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
    return f"row {shown}" if len(rows) == 1 else f"{len(rows)} rows ({shown})"


def to_numpy(x: Tensor) -> Ints:
    """Integers or booleans of any device and shape."""
    array: Ints = x.cpu().numpy().astype(np.int64)
    return array
