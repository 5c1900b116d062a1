"""Results of evaluations: append-only JSON lines, one evaluation each, the source of every table and figure."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, get_args

from pydantic import TypeAdapter, ValidationError

from shards.manifest import parse_json
from trainer.config import Candidates, HistoryOrder, Split, Task, Tie
from trainer.evaluation.ranking import Estimate
from trainer.runs.atomic import named_in_errors

RESULTS_FILE: Final = "results.jsonl"
"""Name of the results file in a run folder."""

FORMAT_VERSION: Final = 4
"""Version of the results format; increment it when a field is added, renamed or changes its meaning."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Result:
    """One evaluation of one model.

    Raises:
        ValueError: an unknown choice, a time that is not in UTC, or a metric that is not finite.
    """

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
    """Items ranked per user, the target included; None if the number differs between users."""
    history: HistoryOrder
    tie: Tie
    extensions: tuple[str, ...] = ()
    """Settings by which the system goes beyond its paper, such as `system.max_vector_items=118`."""
    step: int
    """Optimizer step of the evaluated checkpoint."""
    users: int
    metrics: Mapping[str, Estimate]
    """Means over users. With lists, also ARP@10, APLT@10 and MIUF@10, and for shuffled histories Jaccard@10
    (`trainer.evaluation.beyond`)."""
    totals: Mapping[str, float] = field(default_factory=dict)
    """Numbers of all users together, which have no interval: coverage@10, and where users have several targets, their
    number and the metrics' means over them (`Evaluation.over_targets`)."""
    later_training: float | None = None
    """Share of training events later than the median test event: what a leave-one-out split leaks; None if unknown."""
    seconds: float
    """Wall-clock time of the evaluation."""
    tokens: int
    """LLM tokens run for users, over all ranks; 0 without an LLM."""
    peak_memory_bytes: int
    """Peak memory of one rank: of its accelerator, or of the process on a CPU."""
    device: str
    created: str
    """ISO 8601 in UTC, as returned by `utc_now`."""

    def __post_init__(self) -> None:
        choices = {"split": Split, "task": Task, "candidates": Candidates, "history": HistoryOrder, "tie": Tie}
        for name, choice in choices.items():
            if getattr(self, name) not in get_args(choice):
                raise ValueError(f"{name} must be one of {get_args(choice)}, not {getattr(self, name)!r}")
        if datetime.fromisoformat(self.created).utcoffset() != timedelta(0):
            raise ValueError(f"created must be in UTC, as in 2025-03-08T12:00:00+00:00, not {self.created!r}")
        for name, estimate in self.metrics.items():
            # Also rejects NaN, which compares false: `json.dumps` would write NaN and Infinity, which are not JSON.
            if not all(abs(x) < float("inf") for x in (estimate.value, estimate.low, estimate.high)):
                raise ValueError(f"metric {name} is not finite: {estimate}")
        for name, value in {**self.totals, "later_training": self.later_training or 0.0}.items():
            if not abs(value) < float("inf"):
                raise ValueError(f"{name} is not finite: {value}")


_RESULT: Final = TypeAdapter(Result)


def utc_now() -> str:
    """The current time, in the format of `Result.created`."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def append(path: Path, result: Result) -> None:
    """Append one line to `path`, in a single write that is on disk on return; creates file and folder if needed.

    If a crash has cut the last line short, that line is ended first, so that only it is damaged.

    Raises:
        OSError: the line could not be written completely.
    """
    line = json.dumps({"version": FORMAT_VERSION, **asdict(result)}, allow_nan=False).encode() + b"\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with named_in_errors(path), open(path, "a+b", buffering=0) as file:
        if (size := file.seek(0, os.SEEK_END)) > 0:
            file.seek(size - 1)
            if file.read(1) != b"\n":
                line = b"\n" + line
        # Append mode writes at the end, regardless of the position after reading.
        if (written := file.write(line)) != len(line):
            raise OSError(f"{path}: wrote {written} of {len(line)} bytes; is the disk full?")
        os.fsync(file.fileno())


def read(path: Path) -> list[Result]:
    """All results in a file, oldest first.

    A line that is not a JSON object, because a crash cut it short, is skipped with a warning that names it.

    Raises:
        ValueError: an object's fields are not those of `Result`; the message names file, line and writer's version.
        FileNotFoundError: the file does not exist.
    """
    results = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            record = parse_json(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            _logger.warning("%s:%d: damaged line of %d bytes skipped", path, number, len(line))
            continue
        results.append(_parse(record, f"{path}:{number}"))
    return results


def latest(results: Iterable[Result]) -> list[Result]:
    """The newest result of each run, system, data, split, task, candidates (kind, number, ties) and history.

    In the order in which each combination first appears; at equal times the later result counts.
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
        record.setdefault("task", "retrieval")  # the only task of version 1
    if version in (1, 2):
        record.setdefault("extensions", [])  # there were none
    if version in (1, 2, 3):  # which had no lists, and did not look for leaks
        record.setdefault("totals", {})
        record.setdefault("later_training", None)
    writer = f"written in format version {version}, but this code reads version {FORMAT_VERSION}"
    known = {entry.name for entry in fields(Result)}
    if unknown := sorted(record.keys() - known):
        raise ValueError(f"{where}: unknown field {', '.join(unknown)}: {writer}; update the code")
    if missing := sorted(known - record.keys()):
        raise ValueError(f"{where}: missing field {', '.join(missing)}: {writer}; evaluate the run again")
    try:
        return _RESULT.validate_json(json.dumps(record), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{where}: {'.'.join(map(str, first['loc']))}: {first['msg']}; {writer}") from None


def _time(result: Result) -> datetime:
    return datetime.fromisoformat(result.created)


def collect(runs: Sequence[Path], split: str, candidates: str) -> list[Result]:
    """The results of all runs on a split with this kind of candidates.

    Raises:
        ValueError: a run has none, or two runs of one system have the same name.
    """
    results: list[Result] = []
    folder_of: dict[tuple[str, str], Path] = {}
    for run in dict.fromkeys(runs):
        full = f" --candidates {candidates}" if candidates != "sampled" else ""
        cure = f"`llm-srec evaluate {run} --split {split}{full}`"
        path = run / RESULTS_FILE
        if not path.is_file():
            raise ValueError(f"{path} does not exist: write it with {cure}")
        wanted = [r for r in read(path) if r.split == split and r.candidates == candidates]
        if not wanted:
            raise ValueError(f"{path} has no {split} results with {candidates} candidates: add them with {cure}")
        for r in wanted:
            other = folder_of.setdefault((r.system, r.run), run)
            if other != run:
                # `latest` would silently drop the older of the two.
                raise ValueError(f"{other} and {run} both hold {r.system} run {r.run!r}: report them separately")
        results += wanted
    return results
