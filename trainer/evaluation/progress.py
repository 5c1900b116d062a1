"""Progress of what takes minutes: a bar on a terminal, a log line every half minute elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType
from typing import Self

from tqdm import tqdm

_LINE_SECONDS = 30.0
"""Time between log lines; what ends sooner has none."""

log = logging.getLogger(__name__)


class Progress:
    """Counts the rows that are done, with an ETA; a no-op where it is not `enabled` (ranks other than 0)."""

    def __init__(self, what: str, total: int, *, enabled: bool = True) -> None:
        """Start to count.

        Args:
            what: what is done, such as "encoding items".
            total: rows in all.
        """
        self._what, self._total, self._enabled = what, total, enabled
        self._done = 0
        self._start = self._last_line = time.monotonic()
        # Below the bar of a training; it vanishes once it is full.
        self._bar = tqdm(
            total=total, desc=what, leave=False, dynamic_ncols=True, disable=not (enabled and sys.stderr.isatty())
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def add(self, rows: int) -> None:
        """Count rows as done, at most up to the total."""
        rows = min(rows, self._total - self._done)
        self._done += rows
        self._bar.update(rows)
        now = time.monotonic()
        if not self._enabled or not self._bar.disable or now - self._last_line < _LINE_SECONDS or not self._done:
            return
        self._last_line = now
        left = round((now - self._start) / self._done * (self._total - self._done))
        log.info("%s: %s of %s, ETA %d:%02d", self._what, f"{self._done:,}", f"{self._total:,}", left // 60, left % 60)
