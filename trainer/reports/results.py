"""What a run measured: append-only JSON lines, one evaluation each, the source of every table and figure."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, get_args

from pydantic import TypeAdapter, ValidationError

from trainer.config import Candidates, HistoryOrder, Split, Task, Tie
from trainer.evaluation.ranking import Estimate

RESULTS_FILE: Final = "results.jsonl"
"""Its name inside a run's folder."""

FORMAT_VERSION: Final = 2
"""Raise it when a field is added, renamed or changes its meaning."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Result:
    """One evaluation of one model. Raises ValueError for unknown choices, local times and NaN metrics."""

    run: str
    system: str
    dataset: str
    dataset_fingerprint: str
    config_hash: str
    commit: str
    split: Split
    task: Task
    candidates: Candidates
    num_candidates: int | None
    """Items ranked for each user, the target among them; None where it differs between users."""
    history: HistoryOrder
    tie: Tie
    step: int
    users: int
    metrics: Mapping[str, Estimate]
    seconds: float
    tokens: int
    peak_memory_bytes: int
    device: str
    created: str
    """ISO 8601 in UTC, as `utc_now` gives it."""

    def __post_init__(self) -> None:
        choices = {"split": Split, "task": Task, "candidates": Candidates, "history": HistoryOrder, "tie": Tie}
        for name, choice in choices.items():
            if getattr(self, name) not in get_args(choice):
                raise ValueError(f"{name} must be one of {get_args(choice)}, not {getattr(self, name)!r}")
        if datetime.fromisoformat(self.created).utcoffset() != timedelta(0):
            raise ValueError(f"created must be in UTC, as in 2025-03-08T12:00:00+00:00, not {self.created!r}")
        for name, estimate in self.metrics.items():
            # Comparisons with NaN are false, so this refuses it as well; json would write a line none can
            # read.
            if not all(abs(x) < float("inf") for x in (estimate.value, estimate.low, estimate.high)):
                raise ValueError(f"metric {name} is not finite: {estimate}")


_RESULT: Final = TypeAdapter(Result)


def utc_now() -> str:
    """The time as `Result.created` wants it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def append(path: Path, result: Result) -> None:
    """Add one line to `path`, created with its folder if need be, in one write that is on disk on return.

    If a crash cut the last line short, that line is ended first, so it damages itself alone.
    """
    line = json.dumps({"version": FORMAT_VERSION, **asdict(result)}, allow_nan=False).encode() + b"\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b", buffering=0) as file:
        if (size := file.seek(0, os.SEEK_END)) > 0:
            file.seek(size - 1)
            if file.read(1) != b"\n":
                line = b"\n" + line
        # The append mode puts the write at the end wherever the reading left off.
        if (written := file.write(line)) != len(line):
            raise OSError(f"{path}: wrote {written} of {len(line)} bytes; is the disk full?")
        os.fsync(file.fileno())


def read(path: Path) -> list[Result]:
    """All results of a file, oldest first.

    A line that is no JSON object (a crash cut it) is left out with a warning that names it. Raises
    ValueError, with file, line and version of the writer, for an object whose fields are not those of
    `Result`, and FileNotFoundError.
    """
    results = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            _logger.warning("%s:%d: damaged line of %d bytes left out", path, number, len(line))
            continue
        results.append(_parse(record, f"{path}:{number}"))
    return results


def latest(results: Iterable[Result]) -> list[Result]:
    """The newest result of each run, system, data, split, task, candidates (kind, number, ties) and history.

    They stand in the order in which their kind first came; of equal times the later one counts.
    """
    newest: dict[tuple[object, ...], Result] = {}
    for result in results:
        key = (
            *(result.run, result.system, result.dataset_fingerprint, result.split, result.task),
            *(result.candidates, result.num_candidates, result.tie, result.history),
        )
        if key not in newest or _time(result) >= _time(newest[key]):
            newest[key] = result
    return list(newest.values())


def _parse(record: dict[str, Any], where: str) -> Result:
    version = record.pop("version", "unknown")
    if version == 1:
        record.setdefault("task", "retrieval")  # there was no other
    writer = f"written in format version {version}, while this program knows version {FORMAT_VERSION}"
    known = {field.name for field in fields(Result)}
    if unknown := sorted(record.keys() - known):
        raise ValueError(f"{where}: unknown field {', '.join(unknown)}: {writer}; update the program")
    if missing := sorted(known - record.keys()):
        raise ValueError(f"{where}: without field {', '.join(missing)}: {writer}; evaluate the run again")
    try:
        return _RESULT.validate_python(record)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{where}: {'.'.join(map(str, first['loc']))}: {first['msg']}; {writer}") from None


def _time(result: Result) -> datetime:
    return datetime.fromisoformat(result.created)


def collect(runs: Sequence[Path], split: str, candidates: str) -> list[Result]:
    """The wanted results of all runs.

    Raises:
        ValueError: a run has none, or two runs of one system have one name.
    """
    results: list[Result] = []
    folder_of: dict[tuple[str, str], Path] = {}
    for run in dict.fromkeys(runs):
        full = " --candidates full" if candidates == "full" else ""
        cure = f"`python launchers/evaluate.py {run} --split {split}{full}`"
        path = run / RESULTS_FILE
        if not path.is_file():
            raise ValueError(f"{path} does not exist: write it with {cure}")
        wanted = [r for r in read(path) if r.split == split and r.candidates == candidates]
        if not wanted:
            raise ValueError(f"{path} has no {split} results with {candidates} candidates: add them with {cure}")
        for r in wanted:
            other = folder_of.setdefault((r.system, r.run), run)
            if other != run:
                # Only the newer would be shown, as if the other had not been asked for.
                raise ValueError(f"{other} and {run} both hold {r.system} run {r.run!r}: report them one by one")
        results += wanted
    return results
