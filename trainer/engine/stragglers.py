"""How fast a run goes: a rank that holds up the others, and when enough was done for a checkpoint.

Letters: R ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median_low

WINDOW = 20
"""Steps that are judged together: a straggler is told of after at most twice as many."""
_SHARE = 0.2
"""Of a step, that one rank costs beyond the median rank, to be worth a warning."""
_SECONDS = 0.01
"""Below this a step's time is noise."""


class Stragglers:
    """Finds a rank whose own work (data and forward pass) makes all others wait.

    The time that a rank needs for itself differs between ranks; that of a whole step does not, since they wait for
    each other. The low median is used, so that of two ranks the slow one is compared with the fast one.
    """

    def __init__(self) -> None:
        self._busy: list[Sequence[float]] = []
        self._seconds = 0.0
        self._told: int | None = None

    def add(self, busy_R: Sequence[float], seconds: float) -> str | None:
        """Tell of a step; returns a warning once a window is full and a rank straggles that did not before."""
        self._busy.append(busy_R)
        self._seconds += seconds
        if len(self._busy) < WINDOW:
            return None
        mean_R = [sum(column) / WINDOW for column in zip(*self._busy, strict=True)]
        step, self._busy, self._seconds = self._seconds / WINDOW, [], 0.0
        slow, median = max(mean_R), median_low(mean_R)
        before, self._told = self._told, None
        if slow - median < max(_SHARE * step, _SECONDS):
            return None
        self._told = mean_R.index(slow)
        if self._told == before:
            return None
        return (
            f"rank {self._told} holds up the others: its own work takes {slow / step:.0%} of a step "
            f"({slow:.3f} s of {step:.3f} s), that of the median rank {median / step:.0%}"
        )
