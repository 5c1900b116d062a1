"""Result tables as text or markdown: metrics, confidence intervals, and the change with a shuffled history."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from trainer.config import Candidates, Task
from trainer.evaluation.ranking import Estimate, chance
from trainer.reports.results import Result, latest

Style = Literal["text", "markdown"]

METRICS: Mapping[Task, tuple[str, ...]] = {
    "retrieval": ("NDCG@10", "HR@10", "NDCG@20", "HR@20"),
    "generation": ("HR@1", "HR@1 (greedy)", "valid (greedy)"),
}
WIDTH = 100
"""Width of a text table in characters; metrics that do not fit side by side go below each other."""

_MISSING = "-"
_CANDIDATES: Mapping[Candidates, str] = {
    "sampled": "sampled candidates",
    "full": "items of the full catalog",
    "full_with_seen": "items of the full catalog, seen ones too",
}
_LABEL_WIDTH = 20  # leaves room for two metrics and a million users
_METRIC_HEADER = ("original", "shuffled", "change")
_METRIC_WIDTHS = (14, 8, 8)
_EXTENDED = "†"
_NOTE = "±: half the 95 % bootstrap interval over users. change: shuffled against original history."


@dataclass(frozen=True)
class _Row:
    name: str
    original: Result | None
    shuffled: Result | None

    @property
    def extensions(self) -> Sequence[str]:
        """Settings by which the system goes beyond its paper."""
        result = self.original or self.shuffled
        return result.extensions if result else ()

    @property
    def label(self) -> str:
        return f"{self.name} {_EXTENDED}" if self.extensions else self.name

    @property
    def users(self) -> str:
        result = self.original or self.shuffled
        assert result is not None, "a row comes from a result"
        return f"{result.users:,}{'*' if self.mismatch else ''}"

    @property
    def mismatch(self) -> str | None:
        """A note if the two histories were measured on different numbers of users, so that the change means less."""
        if self.original is None or self.shuffled is None or self.original.users == self.shuffled.users:
            return None
        return f"* {self.name}: the shuffled history was measured on {self.shuffled.users:,} users."


@dataclass(frozen=True)
class _Table:
    title: str
    task: Task
    rows: tuple[_Row, ...]
    num_candidates: int | None


def comparison(results: Iterable[Result], metrics: Sequence[str] | None = None, style: Style = "text") -> str:
    """A table per dataset, split and kind of candidates, with a row per run of each system.

    Only the newest result of each kind is shown; rows are in the order of `results`. The last row is the chance level,
    which equal scores for all candidates would reach, if their number is known.

    Args:
        metrics: names of the metrics to show; None: the main ones of the task.

    Raises:
        ValueError: no results, no metrics, or a metric that no result has.
    """
    newest = latest(results)
    if not newest:
        raise ValueError("there are no results to compare")
    if metrics is not None and not metrics:
        raise ValueError("name at least one metric to compare")
    known = dict.fromkeys(name for result in newest for name in result.metrics)
    if unknown := [name for name in metrics or () if name not in known]:
        raise ValueError(f"no result has {', '.join(unknown)}; available metrics: {', '.join(known)}")
    render = _markdown if style == "markdown" else _text
    tables = _tables(newest)
    rows = [row for table in tables for row in table.rows]
    notes = [_NOTE, *(row.mismatch for row in rows if row.mismatch), *_extended(rows)]
    # In markdown, a single line break does not start a new line.
    ending = ("\n\n" if style == "markdown" else "\n").join(notes)
    return "\n\n".join([*(render(table, metrics or _present(table)) for table in tables), ending]) + "\n"


def _extended(rows: Sequence[_Row]) -> list[str]:
    """A note per set of extensions."""
    names: dict[tuple[str, ...], dict[str, None]] = {}
    for row in rows:
        if row.extensions:
            names.setdefault(tuple(row.extensions), {})[row.name] = None
    return [f"{_EXTENDED} {', '.join(of)}: goes beyond the paper with {', '.join(keys)}." for keys, of in names.items()]


def differences(first: str, others: Mapping[str, Estimate], metric: str, style: Style = "text") -> str:
    """How much better one run is than each of the others, user by user: a table, and one sentence that reads it.

    Args:
        first: name of the run.
        others: mean difference to each other run, by its name, with its 95 % paired bootstrap interval.
    """
    width = max(map(len, others))
    cells = [(name, f"{e.value:+.4f}", f"[{e.low:+.4f}, {e.high:+.4f}]") for name, e in others.items()]
    title = f"{metric} of {first} minus that of each other run, over the same users (95 % paired bootstrap interval)"
    if style == "markdown":
        rows = [("other run", "difference", "interval"), ("---", "---:", "---:"), *cells]
        title, lines = f"**{title}**", [f"| {' | '.join(row)} |" for row in rows]
    else:
        lines = [f"{name:<{width}}  {value}  {interval}" for name, value, interval in cells]
    return "\n".join([title, "", *lines, "", verdict(first, others)]) + "\n"


def verdict(first: str, others: Mapping[str, Estimate]) -> str:
    """Which runs are worse and better, and from which the interval does not tell."""
    kinds = {
        "better than": [name for name, e in others.items() if e.low > 0],
        "worse than": [name for name, e in others.items() if e.high < 0],
        "not distinguishable from": [name for name, e in others.items() if e.low <= 0 <= e.high],
    }
    return f"{first} is " + "; ".join(f"{kind} {', '.join(names)}" for kind, names in kinds.items() if names) + "."


def _present(table: _Table) -> tuple[str, ...]:
    """The main metrics of the task that at least one row has."""
    results = [result for row in table.rows for result in (row.original, row.shuffled) if result]
    return tuple(name for name in METRICS[table.task] if any(name in result.metrics for result in results))


def _tables(results: list[Result]) -> list[_Table]:
    """Group results into tables: results are comparable if all but the model and the history order is the same."""
    groups: dict[tuple[object, ...], list[Result]] = {}
    for r in results:
        key = (r.dataset, r.dataset_fingerprint, r.split, r.task, r.candidates, r.num_candidates, r.tie)
        groups.setdefault(key, []).append(r)
    names = Counter(dataset for dataset, _ in {(r.dataset, r.dataset_fingerprint) for r in results})
    return [
        _Table(_title(group[0], names[group[0].dataset] > 1), group[0].task, _rows(group), group[0].num_candidates)
        for group in groups.values()
    ]


def _title(result: Result, several_versions: bool) -> str:
    kind = _CANDIDATES[result.candidates]
    if result.task == "generation":
        kind = "candidate titles"
    number = "" if result.num_candidates is None else f"{result.num_candidates:,} "
    parts = [result.dataset, f"{result.split} split", number + kind]
    if several_versions:
        parts.insert(1, f"data {result.dataset_fingerprint[:12]}")
    if result.tie != "expectation":
        parts.append(f"{result.tie} ties")
    return " · ".join(parts)


def _rows(group: list[Result]) -> tuple[_Row, ...]:
    models = dict.fromkeys((r.system, r.run) for r in group)
    runs_of = Counter(system for system, _ in models)
    found = {(r.system, r.run, r.history): r for r in group}
    return tuple(
        _Row(
            name=row_name(system, run, alone=runs_of[system] == 1),
            original=found.get((system, run, "original")),
            shuffled=found.get((system, run, "shuffled")),
        )
        for system, run in models
    )


def row_name(system: str, run: str, *, alone: bool) -> str:
    """Name of a row: the system, and the run where several rows are of one system."""
    if alone:
        return system
    return run if run.startswith(system) else f"{system} ({run})"


def _cells(row: _Row, metric: str) -> tuple[str, str, str]:
    """Original value with its interval, shuffled value, and the relative change."""
    original = row.original.metrics.get(metric) if row.original else None
    shuffled = row.shuffled.metrics.get(metric) if row.shuffled else None
    change = _MISSING
    if original and shuffled and original.value > 0:
        change = f"{100 * (shuffled.value - original.value) / original.value:+.1f} %"
    return (
        f"{original.value:.4f} ±{original.half_width:.4f}" if original else _MISSING,
        f"{shuffled.value:.4f}" if shuffled else _MISSING,
        change,
    )


def _chance(table: _Table, metrics: Sequence[str]) -> list[str] | None:
    """Chance level of each metric ("" if it has none); None if the number of candidates varies."""
    if table.num_candidates is None:
        return None
    cuts = sorted({int(found[1]) for name in metrics if (found := re.search(r"@(\d+)$", name))})
    level = chance(table.num_candidates, cuts)
    return [f"{level[name]:.4f}" if name in level else "" for name in metrics]


def _text(table: _Table, metrics: Sequence[str]) -> str:
    labels = _shortened([row.label for row in table.rows])
    label_width = max(len(label) for label in [*labels, "system", "chance"])
    users_width = max(8, *(len(row.users) for row in table.rows))
    block_width = sum(_METRIC_WIDTHS) + len(_METRIC_WIDTHS) - 1
    beside = max(1, (WIDTH - label_width - users_width - 2) // (block_width + 2))
    lines = [table.title]
    for first in range(0, len(metrics), beside):
        shown = metrics[first : first + beside]
        heads = [f" {name} ".center(block_width, "─") for name in shown]
        lines += ["", "  ".join([" " * (label_width + 2 + users_width), *heads])]
        lines.append(
            "  ".join(
                [
                    "system".ljust(label_width),
                    "users".rjust(users_width),
                    *[_block(_METRIC_HEADER)] * len(shown),
                ]
            )
        )
        for label, row in zip(labels, table.rows, strict=True):
            blocks = [_block(_cells(row, name)) for name in shown]
            lines.append("  ".join([label.ljust(label_width), row.users.rjust(users_width), *blocks]))
        if (levels := _chance(table, shown)) is not None:
            # Padded to align with the value rather than with its interval.
            blocks = [_block((f"{level:<6} {'':7}", "", "")) for level in levels]
            lines.append("  ".join(["chance".ljust(label_width), " " * users_width, *blocks]).rstrip())
    return "\n".join(lines)


def _block(cells: tuple[str, str, str]) -> str:
    return " ".join(cell.rjust(width) for cell, width in zip(cells, _METRIC_WIDTHS, strict=True))


def _shortened(labels: list[str]) -> list[str]:
    """Cut the middle of long labels, since the end tells runs of one system apart; cut none if that makes two equal."""
    head = _LABEL_WIDTH // 2
    short = [
        label if len(label) <= _LABEL_WIDTH else label[:head] + "…" + label[head + 1 - _LABEL_WIDTH :]
        for label in labels
    ]
    return short if len(set(short)) == len(set(labels)) else labels


def _markdown(table: _Table, metrics: Sequence[str]) -> str:
    header = ["system", "users", *(cell for name in metrics for cell in (name, "shuffled", "change"))]
    body = [[row.label, row.users, *(cell for name in metrics for cell in _cells(row, name))] for row in table.rows]
    if (levels := _chance(table, metrics)) is not None:
        body.append(["chance", "", *(cell for level in levels for cell in (level, "", ""))])
    rule = ["---", *["---:"] * (len(header) - 1)]
    rows = [[cell.replace("|", "\\|") for cell in row] for row in (header, rule, *body)]
    return "\n".join([f"**{table.title}**", "", *(f"| {' | '.join(row)} |" for row in rows)])
