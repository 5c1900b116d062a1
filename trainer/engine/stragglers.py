"""Straggler detection: a rank whose own work makes the others wait.

Letters: R ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median_low

WINDOW = 20
"""Steps that are averaged; a straggler is reported after at most twice this many."""
_MIN_SHARE = 0.2
"""Fraction of a step by which a rank must exceed the median rank to be reported."""
_MIN_SECONDS = 0.01
"""Seconds by which it must exceed the median rank; differences below this are noise."""


class Stragglers:
    """Finds a rank whose own work (data loading and forward pass) makes all others wait.

    The time of a rank's own work differs between ranks; that of a whole step does not, since ranks wait for each other.
    The low median is used, so that of two ranks the slow one is compared with the fast one.
    """

    def __init__(self) -> None:
        self._busy: list[Sequence[float]] = []
        self._seconds = 0.0
        self._reported: int | None = None

    def add(self, busy_R: Sequence[float], seconds: float) -> str | None:
        """Record a step: each rank's own work and the whole step, in seconds.

        Returns:
            A warning, once per full window, if a rank straggles that did not in the previous window; otherwise None.
        """
        self._busy.append(busy_R)
        self._seconds += seconds
        if len(self._busy) < WINDOW:
            return None
        mean_R = [sum(column) / WINDOW for column in zip(*self._busy, strict=True)]
        step, self._busy, self._seconds = self._seconds / WINDOW, [], 0.0
        slow, median = max(mean_R), median_low(mean_R)
        before, self._reported = self._reported, None
        if slow - median < max(_MIN_SHARE * step, _MIN_SECONDS):
            return None
        self._reported = mean_R.index(slow)
        if self._reported == before:
            return None
        return (
            f"rank {self._reported} is a straggler: its data loading and forward pass take {slow / step:.0%} of a step "
            f"({slow:.3f} s of {step:.3f} s), those of the median rank {median / step:.0%}"
        )
