"""Sections about ranking quality: one table of all runs, intervals, hits by cut-off, and paired differences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainer.evaluation.ranking import METRIC_NAMES, Estimate, Floats, chance
from trainer.reports.page.content import Block, Cell, Figure, Panel, Section, Table, Text, signed
from trainer.reports.page.figures import Line, Span, interval_chart, line_chart
from trainer.reports.results import Result
from trainer.reports.tables import METRICS, verdict
from trainer.reports.user_ranks import UserRanks, paired_difference

_CUTS = range(1, 21)
_INTERVALS = "Filled: original histories. Hollow: the same model with every history in random order. Bars: 95 % "
_INTERVALS += "bootstrap intervals over users. Dashed: chance."


@dataclass(frozen=True)
class Row:
    """A run's results, or those of a baseline that is no run."""

    label: str
    style: int
    original: Result | None
    shuffled: Result | None = None
    ranks: UserRanks | None = None

    @property
    def result(self) -> Result | None:
        """What both histories have in common."""
        return self.original or self.shuffled


def quality(rows: Sequence[Row]) -> Section | None:
    """All results; None if there are none."""
    shown = [row for row in rows if row.result]
    if not shown:
        return None
    names = main_metrics(shown)
    # Two metrics with their changes are as wide as a screen.
    blocks: list[Block] = [_table(shown, names[first : first + 2]) for first in range(0, len(names), 2)]
    blocks.append(Text(_note(shown), small=True))
    if panels := [*_interval_panels(shown, names[:2]), *_hit_panel(shown)]:
        legend = tuple((row.label, row.style) for row in shown) if len(shown) > 1 else ()
        blocks.append(Figure(tuple(panels), legend, _INTERVALS))
    return Section("Quality", tuple(blocks))


def paired(first: Row, others: Sequence[Row], metric: str) -> tuple[Section | None, str]:
    """The first run against each other, user by user, and the sentence that reads it ("" if nothing compares)."""
    found: dict[str, Estimate] = {}
    rows: list[list[Cell | Estimate | str | float | None]] = []
    for other in others:
        if first.ranks is None or other.ranks is None or metric not in METRIC_NAMES or first.original is None:
            continue
        if not np.array_equal(first.ranks.user_T, other.ranks.user_T):
            continue  # measured on different users
        difference = paired_difference(first.ranks, other.ranks, metric, first.original.tie)
        ahead_U = position(other.ranks) - position(first.ranks)
        rows.append(
            [
                other.label,
                Cell(
                    signed(difference.value, ".4f"), difference.value, strong=difference.low > 0 or difference.high < 0
                ),
                Cell(f"[{signed(difference.low, '.4f')}, {signed(difference.high, '.4f')}]", difference.low),
                *(int(np.sum(select)) for select in (ahead_U > 0, ahead_U == 0, ahead_U < 0)),
            ]
        )
        found[other.label] = difference
    if not found:
        return None, ""
    columns = [f"{first.label} against", f"{metric} difference", "95 % interval", "users better", "same", "worse"]
    note = (
        "Paired over the same users: the interval is that of the users' differences. Better: the target ranks higher."
    )
    table = Table.of(columns, rows, note=note)
    return Section("User by user", (Text(verdict(first.label, found)), table)), verdict(first.label, found)


def main_metrics(rows: Sequence[Row]) -> list[str]:
    """The main metrics of the task that a row has."""
    results = [result for row in rows if (result := row.result)]
    return [name for name in METRICS[results[0].task] if any(name in result.metrics for result in results)]


def position(ranks: UserRanks) -> Floats:
    """(U,) mean rank of each user's targets, 1 the best; ties count half."""
    return ranks.mean(1 + ranks.ranks.greater + ranks.ranks.ties / 2)


def _table(rows: Sequence[Row], names: Sequence[str]) -> Table:
    columns = ["run", "system", "users"]
    for name in names:
        columns += [name, f"{name} shuffled", "change"]
    body: list[list[Cell | Estimate | str | float | None]] = []
    for row in rows:
        result = row.result
        assert result is not None, "rows without results are left out"
        line: list[Cell | Estimate | str | float | None] = [row.label, _system(result), result.users]
        for name in names:
            line += _cells(row, name)
        body.append(line)
    if levels := _chance(rows):
        body.append(["chance", "", None, *(x for name in names for x in (_level(levels, name), None, None))])
    return Table.of(columns, body)


def _note(rows: Sequence[Row]) -> str:
    notes = ["±: half the 95 % bootstrap interval. Change: with every history in random order."]
    if extended := sorted({word for row in rows if row.result for word in row.result.extensions}):
        notes.append(f"† goes beyond the paper with {', '.join(extended)}.")
    return " ".join(notes)


def _system(result: Result) -> str:
    return f"{result.system} †" if result.extensions else result.system


def _cells(row: Row, name: str) -> list[Cell | Estimate | str | float | None]:
    original = row.original.metrics.get(name) if row.original else None
    shuffled = row.shuffled.metrics.get(name) if row.shuffled else None
    change: Cell | None = None
    if original and shuffled and original.value > 0:
        percent = 100 * (shuffled.value - original.value) / original.value
        change = Cell(signed(percent, ".1f") + " %", percent)
    return [original, Cell(f"{shuffled.value:.4f}", shuffled.value) if shuffled else None, change]


def _level(levels: dict[str, float], name: str) -> Cell | None:
    return Cell(f"{levels[name]:.4f}", levels[name]) if name in levels else None


def _chance(rows: Sequence[Row]) -> dict[str, float] | None:
    """Metrics of random scores, if all rows rank the same number of candidates."""
    counts = {row.result.num_candidates for row in rows if row.result}
    count = counts.pop() if len(counts) == 1 else None
    return chance(count, [1, 5, 10, 20]) if count else None


def _interval_panels(rows: Sequence[Row], names: Sequence[str]) -> list[Panel]:
    levels = _chance(rows) or {}
    panels = []
    for name in names:
        spans = [
            Span(
                row.label,
                row.style,
                row.original.metrics.get(name) if row.original else None,
                row.shuffled.metrics.get(name) if row.shuffled else None,
            )
            for row in rows
        ]
        panels.append(interval_chart(name, spans, levels.get(name)))
    return panels


def _hit_panel(rows: Sequence[Row]) -> list[Panel]:
    lines = [
        Line(row.style, _CUTS, [float(np.mean(position(row.ranks) <= cut)) for cut in _CUTS])
        for row in rows
        if row.ranks is not None
    ]
    return (
        [line_chart("Users whose next item is among the first k", lines, "k", x_ticks=(1, 5, 10, 15, 20))]
        if lines
        else []
    )
