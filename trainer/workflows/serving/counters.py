"""Counters and histograms in the text format of Prometheus (version 0.0.4)."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
SIZES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)


class Histogram:
    """Observations by upper bounds. Observe from one thread only; reading from others sees a recent state."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count a value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def lines(self, name: str) -> Iterator[str]:
        """The lines of the metric, with cumulative counts."""
        yield f"# TYPE {name} histogram"
        total = 0
        for bound, count in zip((*map(str, self._bounds), "+Inf"), self._counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self._sum:.6f}"
        yield f"{name}_count {total}"


class Counters:
    """Counts of a server."""

    def __init__(self) -> None:
        self.responses: Counter[tuple[str, int]] = Counter()
        """By route and status."""
        self.request_seconds = Histogram(SECONDS)
        """From a whole request to its answer, of recommendations alone."""
        self.batch_seconds = Histogram(SECONDS)
        self.batch_size = Histogram(SIZES)

    def observe_batch(self, size: int, seconds: float) -> None:
        """Count a batch; called by the model's thread alone."""
        self.batch_size.observe(size)
        self.batch_seconds.observe(seconds)

    def text(self, waiting: int) -> str:
        """All metrics.

        Args:
            waiting: requests in the queue now.
        """
        lines = ["# TYPE llm_srec_responses_total counter"]
        # Routes are those of the application, so that no client can write labels.
        for (route, status), count in sorted(self.responses.items()):
            lines.append(f'llm_srec_responses_total{{route="{route}",status="{status}"}} {count}')
        lines += self.request_seconds.lines("llm_srec_request_seconds")
        lines += self.batch_seconds.lines("llm_srec_batch_seconds")
        lines += self.batch_size.lines("llm_srec_batch_size")
        lines += ["# TYPE llm_srec_queue gauge", f"llm_srec_queue {waiting}"]
        return "\n".join(lines) + "\n"
