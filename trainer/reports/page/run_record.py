"""Contents of a run folder for a report: configuration, results, logged metrics, checkpoints. Needs no torch."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from trainer.config import Candidates, RunConfig, Split, Task
from trainer.reports.results import RESULTS_FILE, Result, latest, read
from trainer.reports.user_ranks import UserRanks, read_ranks
from trainer.runs.folder import Checkpoint, CheckpointError, RunFolder

METRICS_FILE = "metrics.jsonl"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunRecord:
    """One run, as far as its folder tells."""

    label: str
    """Its name in the report."""
    path: Path
    config: RunConfig
    original: Result | None
    """Newest result on original histories, and on shuffled ones."""
    shuffled: Result | None
    points: Mapping[str, tuple[Sequence[int], Sequence[float]]]
    """Steps and values of each logged metric."""
    started: float | None
    """Unix time of the first logged line, in seconds."""
    ended: float | None
    best: Checkpoint | None
    newest: Checkpoint | None

    @property
    def result(self) -> Result | None:
        """A result, for what original and shuffled histories have in common."""
        return self.original or self.shuffled

    @cached_property
    def ranks(self) -> UserRanks | None:
        """Every user's rank behind `original`; None if they were not kept."""
        if self.original is None:
            return None
        try:
            return read_ranks(self.path, self.original)
        except ValueError as error:
            log.warning("%s: left out of what compares users: %s", self.path, error)
            return None


def read_run(path: Path, label: str, split: Split, candidates: Candidates, task: Task | None = None) -> RunRecord:
    """Read a run folder, of a run that may still be training.

    Args:
        task: which results to read; None: those of the run's own task. A run may have been tested on both.

    Raises:
        ConfigError: not a run folder.
        ValueError: damaged results.
    """
    run = RunFolder(path)
    config = run.config()
    file = path / RESULTS_FILE
    wanted = (split, candidates, task or config.task)
    found = [r for r in read(file) if (r.split, r.candidates, r.task) == wanted] if file.is_file() else []
    newest = {result.history: result for result in latest(found)}
    points, times = _points(path / METRICS_FILE)
    return RunRecord(
        label=label,
        path=path,
        config=config,
        original=newest.get("original"),
        shuffled=newest.get("shuffled"),
        points=points,
        started=times[0] if times else None,
        ended=times[-1] if times else None,
        best=_best(run),
        newest=_newest(run),
    )


def labels(paths: Sequence[Path]) -> list[str]:
    """A name for each run: that of its folder, with as many folders above it as tell the runs apart."""
    parts = [path.absolute().parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(set(parts)):
            break
    return names


def _points(file: Path) -> tuple[dict[str, tuple[list[int], list[float]]], list[float]]:
    """Steps and values by metric, and the time of each line. Of a step that a resumed run repeated the last counts."""
    values: dict[str, dict[int, float]] = {}
    times = []
    for line in file.read_text(errors="replace").splitlines() if file.is_file() else []:
        try:
            record = json.loads(line)
            step, time = int(record.pop("step")), float(record.pop("time"))
            found = {str(name): float(value) for name, value in record.items()}
        except (ValueError, TypeError, KeyError, AttributeError):
            continue  # cut short by a kill
        times.append(time)
        for name, value in found.items():
            values.setdefault(name, {})[step] = value
    return {name: (sorted(of), [of[step] for step in sorted(of)]) for name, of in values.items()}, times


def _best(run: RunFolder) -> Checkpoint | None:
    try:
        return run.best()
    except CheckpointError:
        return None


def _newest(run: RunFolder) -> Checkpoint | None:
    try:
        return run.newest()
    except CheckpointError:
        return None
