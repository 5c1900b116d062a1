"""A table of what systems recommend beyond accuracy, and the warning about leave-one-out splits."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence

from trainer.evaluation.beyond import COVERAGE, JACCARD, LIST_METRICS
from trainer.reports.results import Result, latest
from trainer.reports.tables import WIDTH, Style, row_name

COLUMNS = (COVERAGE, *LIST_METRICS, JACCARD)

_MISSING = "-"
_LEGEND = (
    "lists of the ten best items per user, out of the whole catalog. coverage: share of all items; ARP: mean training "
    "events of an item; APLT: share outside the head that holds 80 % of events; MIUF: mean -log2 of an item's share of "
    "users; Jaccard: overlap of the lists for original and shuffled histories."
)


def beyond_accuracy(results: Iterable[Result], style: Style = "text") -> str:
    """A table with a row per run, and the leak warning of its dataset; "" if the results have neither.

    Rows are those of the newest results; Jaccard@10 is that of the shuffled history, all others of the original one.
    """
    newest = latest(results)
    rows = [row for row in _rows(newest) if row.count(_MISSING) < len(COLUMNS)]
    blocks = []
    if rows:
        header = ("lists of 10", *COLUMNS)
        render = _markdown if style == "markdown" else _text
        blocks.append(render([header, *rows]))
        blocks.append(_wrapped(_LEGEND, style))
    blocks += [_wrapped(warning, style) for warning in _leaks(newest)]
    return "".join(f"\n{block}\n" for block in blocks)


def _wrapped(text: str, style: Style) -> str:
    return text if style == "markdown" else textwrap.fill(text, WIDTH)


def _rows(results: Sequence[Result]) -> list[tuple[str, ...]]:
    found: dict[tuple[object, ...], dict[str, Result]] = {}
    for r in results:
        key = (r.dataset_fingerprint, r.split, r.task, r.candidates, r.num_candidates, r.tie, r.system, r.run)
        found.setdefault(key, {})[r.history] = r
    runs_of = Counter(system for system, _ in {(r.system, r.run) for r in results})
    rows = []
    for by_history in found.values():
        first = next(iter(by_history.values()))
        original, shuffled = by_history.get("original"), by_history.get("shuffled")
        cells = [_value(shuffled if name == JACCARD else original, name) for name in COLUMNS]
        rows.append((row_name(first.system, first.run, alone=runs_of[first.system] == 1), *cells))
    return rows


def _value(result: Result | None, name: str) -> str:
    if result is not None and name in result.totals:
        return f"{result.totals[name]:.3f}"
    if result is not None and name in result.metrics:
        value = result.metrics[name].value
        return f"{value:,.1f}" if value >= 100 else f"{value:.3f}"
    return _MISSING


def _leaks(results: Sequence[Result]) -> list[str]:
    """A warning per dataset whose training events are partly later than the median test event."""
    share = {(r.dataset, r.dataset_fingerprint): r.later_training for r in results if r.later_training}
    return [
        f"warning: {100 * part:.0f} % of the training events of {name} are later than the median test event, so "
        "training sees the future of most tests: build the dataset with --split temporal for a test that does not leak."
        for (name, _), part in share.items()
    ]


def _text(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    )


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(rows[0]) - 1)]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in (rows[0], rule, *rows[1:]))
