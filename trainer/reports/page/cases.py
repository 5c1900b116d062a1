"""Which users to show, by rule: those on whom two systems differ most, and a fixed sample of all.

The paper shows users in its Figure 6 that its authors picked. A rule picks the ones that tell against a system, too.

Letters: U users.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    user_U = ranks[names[0]].user_U
    for other in names[1:]:
        user_U = np.intersect1d(user_U, ranks[other].user_U)
    chosen: list[Chosen] = []
    if len(names) > 1:
        first, second = names[:2]
        first_U, second_U = (position(of)[np.searchsorted(of.user_U, user_U)] for of in (ranks[first], ranks[second]))
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
    sample = [int(user) for user in _shuffled(user_U, seed) if int(user) not in taken][:number]
    return chosen + [Chosen(user, "fixed random sample") for user in sample]


def _shuffled(user_U: IntArray, seed: int) -> IntArray:
    return user_U[permutation(len(user_U), seed, _SAMPLE)]
