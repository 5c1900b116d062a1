"""Which users to show, by rule: those on whom systems differ, and a fixed sample.

The paper shows users in its Figure 6 that its authors picked. A rule picks the ones that tell against a system, too. Of
successive test targets, the last one of each user counts.

Letters: U users.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np

from trainer.data.reading.counter_rng import IntArray, permutation
from trainer.reports.page.quality import position
from trainer.reports.user_ranks import UserRanks

_SAMPLE = 9
"""Address of the sample's random numbers; evaluation uses 2."""


@dataclass(frozen=True)
class Chosen:
    """A user, and the rule that chose it."""

    user: int
    """User index."""
    why: str


def choose(ranks: dict[str, UserRanks], number: int, seed: int = 0) -> list[Chosen]:
    """Choose users among those that all runs ranked: `number` per rule, each user once.

    With two runs or more: the largest gain in rank of the first over the second, and its largest loss; then a
    fixed random sample. Equal differences are taken in order of user index.

    Args:
        ranks: of each run, by its name, on original histories.
    """
    names = list(ranks)
    ranks = {name: of.last_targets() for name, of in ranks.items()}
    user_U = _common(ranks)
    chosen: list[Chosen] = []
    if len(names) > 1:
        first, second = names[:2]
        first_U, second_U = (position(ranks[name])[_rows(ranks[name], user_U)] for name in (first, second))
        gain_U = second_U - first_U
        for sign, word in ((1, "gain"), (-1, "loss")):
            order = np.argsort(-sign * gain_U, kind="stable")
            taken = {found.user for found in chosen}
            best = [row for row in order if sign * gain_U[row] > 0 and int(user_U[row]) not in taken][:number]
            chosen += [
                Chosen(int(user_U[row]), f"largest {word} of {first} over {second}, number {place}")
                for place, row in enumerate(best, 1)
            ]
    taken = {found.user for found in chosen}
    untaken_U = user_U[~np.isin(user_U, list(taken))]
    return chosen + sampled(untaken_U, number, "fixed random sample", seed)


@dataclass(frozen=True)
class Pattern:
    """Users whom some systems get right and all others wrong."""

    right: tuple[str, ...]
    wrong: tuple[str, ...]
    user_U: IntArray
    """User indices, ascending."""

    @property
    def label(self) -> str:
        """The pattern in words."""
        if not self.wrong:
            return "all are right"
        if not self.right:
            return "none is right"
        if len(self.right) == 1:
            return f"only {self.right[0]} is right"
        if len(self.wrong) == 1:
            return f"only {self.wrong[0]} is wrong"
        return f"{' and '.join(self.right)} are right, {' and '.join(self.wrong)} are wrong"


def patterns(ranks: dict[str, UserRanks], top: int) -> list[Pattern]:
    """Users that all runs ranked, by which runs have the target among their `top` items; ties count against a run.

    Args:
        ranks: of each run, by its name.

    Returns:
        All 2^R patterns of R runs, from all right to none.
    """
    ranks = {name: of.last_targets() for name, of in ranks.items()}
    user_U = _common(ranks)
    right_RU = np.stack([(of.ranks.greater + of.ranks.ties < top)[_rows(of, user_U)] for of in ranks.values()])
    found = []
    for pattern in product((True, False), repeat=len(ranks)):
        named = list(zip(ranks, pattern, strict=True))
        matches_U = (right_RU == np.array(pattern)[:, None]).all(axis=0)
        right, wrong = (tuple(name for name, is_right in named if is_right is value) for value in (True, False))
        found.append(Pattern(right, wrong, user_U[matches_U]))
    return found


def sampled(user_U: IntArray, number: int, why: str, seed: int = 0) -> list[Chosen]:
    """A fixed random sample of these users."""
    return [Chosen(int(user), why) for user in _shuffled(user_U, seed)[:number]]


def _common(ranks: dict[str, UserRanks]) -> IntArray:
    """Users that all runs ranked, ascending."""
    first, *others = ranks.values()
    user_U = first.user_U
    for other in others:
        user_U = np.intersect1d(user_U, other.user_U)
    return user_U


def _rows(of: UserRanks, user_U: IntArray) -> IntArray:
    return np.searchsorted(of.user_U, user_U)


def _shuffled(user_U: IntArray, seed: int) -> IntArray:
    return user_U[permutation(len(user_U), seed, _SAMPLE)]
