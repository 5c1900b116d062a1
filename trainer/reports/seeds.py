"""Mean and spread over seeds, and which settings are best on the validation items; torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config import RunConfig, built_on, flatten
from trainer.reports.results import Result
from trainer.reports.tables import METRICS, Style
from trainer.runs.folder import CheckpointError, RunFolder

_SHOWN = 2
"""Test metrics, the first of the task."""


@dataclass(frozen=True)
class SeedRun:
    """One run with its test results."""

    name: str
    """Name of its system in the table."""
    config: RunConfig
    valid: float | None
    """Validation metric (`train.metric`) of the best checkpoint; None: unknown."""
    original: Result
    """Test result on original histories."""
    shuffled: Result | None = None


def best_validation(path: Path) -> float | None:
    """The validation metric of a run's best checkpoint; None: it has no checkpoint."""
    try:
        newest = RunFolder(path).newest()
    except CheckpointError:
        return None
    return newest.progress.best_value if newest else None


def group_seeds(runs: Sequence[SeedRun]) -> list[list[SeedRun]]:
    """Runs that differ in nothing but their seed, their folder, and the folders of the runs that they build on.

    Runs of equal seeds are not repetitions: they build on different runs, or are copies, and each is a group alone.
    """
    alike: dict[str, list[SeedRun]] = {}
    for run in runs:
        alike.setdefault(repr((run.config.system.name, sorted(_settings(run).items()))), []).append(run)
    groups = []
    for group in alike.values():
        repeats = len({run.config.seed for run in group}) == len(group)
        groups += [group] if repeats else [[run] for run in group]
    return groups


def seed_table(runs: Sequence[SeedRun], style: Style = "text") -> str:
    """A row per settings: mean over seeds, and standard deviation of more than one.

    Marks the settings of each system that are best on the validation items, where there are several. Choosing by the
    test items instead would make them look better than they are.
    """
    groups = group_seeds(runs)
    names = METRICS[runs[0].original.task][:_SHOWN]
    best = _best(groups)
    chosen = {run.config.train.metric for run in runs}
    valid = f"valid {chosen.pop()}" if len(chosen) == 1 else "valid, by train.metric"
    header = ("system", "settings", "seeds", valid, *names, f"{names[0]} shuffled")
    rows = [header]
    for place, group in enumerate(groups):
        others = [other for other in groups if other[0].config.system.name == group[0].config.system.name]
        tests = [[_value(run.original, name) for run in group] for name in names]
        shuffled = [_value(run.shuffled, names[0]) for run in group]
        rows.append(
            (
                group[0].name,
                _differences(group[0], [other[0] for other in others]) + " (best)" * (place in best),
                str(len(group)),
                _spread([run.valid for run in group]),
                *map(_spread, tests),
                _spread(shuffled),
            )
        )
    note = "Means over seeds (sd: standard deviation)." + " best: by the validation metric." * bool(best)
    if style == "markdown":
        rule = ("---", "---", *["---:"] * (len(header) - 2))
        return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows[1:])) + f"\n\n{note}\n"
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, note]) + "\n"


def _best(groups: Sequence[Sequence[SeedRun]]) -> set[int]:
    """The places of the best group of each system that has several."""
    best = set()
    for system in dict.fromkeys(group[0].config.system.name for group in groups):
        places = [place for place, group in enumerate(groups) if group[0].config.system.name == system]
        means = {place: _mean([run.valid for run in groups[place]]) for place in places}
        known = {place: value for place, value in means.items() if value is not None}
        if len(places) > 1 and len(known) == len(places):
            best.add(max(known, key=lambda place: known[place]))
    return best


def _settings(run: SeedRun) -> dict[str, Any]:
    settings = {".".join(keys): value for keys, value in flatten(run.config.model_dump(mode="json"))}
    left_out = {"seed", "output", *(f"system.{key}" for key in built_on(run.config.system))}
    return {key: value for key, value in settings.items() if key not in left_out}


def _differences(run: SeedRun, others: Sequence[SeedRun]) -> str:
    mine, settings = _settings(run), [_settings(other) for other in others]
    return ", ".join(f"{key}={mine[key]}" for key in mine if any(other.get(key) != mine[key] for other in settings))


def _value(result: Result | None, metric: str) -> float | None:
    return result.metrics[metric].value if result and metric in result.metrics else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if len(known) == len(values) else None


def _spread(values: Sequence[float | None]) -> str:
    mean = _mean(values)
    if mean is None:
        return "-"
    return f"{mean:.4f}" + (
        f" (sd {np.std([v for v in values if v is not None], ddof=1):.4f})" if len(values) > 1 else ""
    )
