"""Measurements of a trained run for an experiment: read from its folder, or made by the evaluation command.

Letters: U users.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np

from shards.manifest import read_manifest
from trainer.config import HistoryOrder, RunConfig
from trainer.evaluation.ranking import METRIC_NAMES, Floats, Ints
from trainer.reports.results import RESULTS_FILE, Result, latest, read
from trainer.reports.user_ranks import read_ranks
from trainer.reports.user_similarity import read_similarity
from trainer.runs.folder import RunFolder
from trainer.runs.other_dataset import folder_elsewhere
from trainer.workflows.comparing.running import run_launcher
from trainer.workflows.experiments.planning import Elsewhere
from trainer.workflows.experiments.spec import Experiment, Measure

SIMILARITY = "cosine_similarity"
"""The metric of `measure: similarity`."""
TRAIN_MINUTES, INFERENCE_MINUTES = "train_min_per_epoch", "inference_min"
"""The metrics of `measure: minutes`: training steps of all users, at the median pace of the logged steps; and the last
validation, which encodes every item and every user once."""
STATISTICS = ("users", "items", "interactions")
"""The metrics of `measure: statistics`."""
_KNOWN: Mapping[Measure, tuple[str, ...]] = {
    "ranking": METRIC_NAMES,
    "similarity": (SIMILARITY,),
    "minutes": (TRAIN_MINUTES, INFERENCE_MINUTES),
    "statistics": STATISTICS,
}

_WARM_UP = 2
"""Logged steps that are not timed: the first ones allocate and compile."""


@dataclass(frozen=True)
class UserMetrics:
    """Metrics of one run, for every user; of what is not measured per user, one value."""

    user_U: Ints
    """User indices, ascending."""
    value: Mapping[str, Floats]
    """(U,) by metric."""


def check_metrics(experiment: Experiment) -> None:
    """Refuse metrics that are not kept for each run.

    Raises:
        ValueError: there is one.
    """
    known = _KNOWN[experiment.measure]
    if unknown := [name for name in experiment.metrics if name not in known]:
        raise ValueError(f"metric {unknown[0]} is not one of measure: {experiment.measure}: use {', '.join(known)}")


def measure(config: RunConfig, experiment: Experiment, where: Sequence[Elsewhere | None], ranks: int) -> str:
    """Make what is missing of a finished run by the evaluation command; returns its error line ("": none).

    Args:
        where: other datasets to test on; None: the run's own.
    """
    if experiment.measure == "minutes" and _minutes(config) is None:
        return f"{config.output} logged no step after the first {_WARM_UP}: set train.log_every=1, or more steps"
    for history, elsewhere in product(experiment.histories.values(), where):
        if found_metrics(config, experiment, history, elsewhere) is None:
            code, error = run_launcher("evaluate.py", _words(config, experiment, history, elsewhere), ranks)
            if code or found_metrics(config, experiment, history, elsewhere) is None:
                return error or f"the evaluation ended without results (exit code {code})"
    return ""


def found_metrics(
    config: RunConfig, experiment: Experiment, history: HistoryOrder, elsewhere: Elsewhere | None = None
) -> UserMetrics | None:
    """Test metrics per user on a history order, from a finished run's folder; None if it was not measured yet."""
    if experiment.measure == "minutes":
        return _minutes(config)
    step = RunFolder(config.output).best().progress.step
    fingerprint = read_manifest(elsewhere.data if elsewhere else config.data.path).fingerprint
    if experiment.measure == "similarity":
        cosine = read_similarity(config.output, "test")
        if cosine is None or (cosine.dataset_fingerprint, cosine.step) != (fingerprint, step):
            return None
        return UserMetrics(cosine.user_U, {SIMILARITY: cosine.cosine_U})
    kind = (fingerprint, step, experiment.task, _candidates(config, experiment), history)
    folder = folder_elsewhere(config.output, fingerprint, elsewhere.unseen) if elsewhere else config.output
    result = next((result for result in _tests(config, folder) if _kind(result) == kind), None)
    if result is None:
        return None
    try:
        ranks = read_ranks(folder, result)
    except ValueError:  # missing or of another evaluation: evaluating again writes them
        return None
    return UserMetrics(ranks.user_U, {name: ranks.metric(name, result.tie) for name in experiment.metrics})


def _minutes(config: RunConfig) -> UserMetrics | None:
    """Minutes by the run's own log; None if it has too few logged steps, or no validation."""
    file = config.output / "metrics.jsonl"
    lines = _whole_lines(file.read_text() if file.is_file() else "")
    paces = [line["speed/users_per_second"] for line in lines if "speed/users_per_second" in line][_WARM_UP:]
    validations = [line["speed/validation_seconds"] for line in lines if "speed/validation_seconds" in line]
    if not paces or not validations:
        return None
    seconds = {
        TRAIN_MINUTES: read_manifest(config.data.path).num_train_users / float(np.median(paces)),
        INFERENCE_MINUTES: validations[-1],
    }
    return UserMetrics(np.zeros(1, np.int64), {name: np.array([value / 60]) for name, value in seconds.items()})


def _whole_lines(text: str) -> list[dict[str, float]]:
    """The JSON lines of a text, without those that a crash cut short."""
    found = []
    for line in text.splitlines():
        with suppress(ValueError):
            found.append(json.loads(line))
    return found


def _tests(config: RunConfig, folder: Path) -> list[Result]:
    """The newest test results of a run in its folder of results, by its way to treat ties."""
    file = folder / RESULTS_FILE
    found = read(file) if file.is_file() else []
    return [result for result in latest(found) if (result.split, result.tie) == ("test", config.evaluation.tie)]


def _kind(result: Result) -> tuple[object, ...]:
    return (result.dataset_fingerprint, result.step, result.task, result.candidates, result.history)


def _candidates(config: RunConfig, experiment: Experiment) -> str:
    return "sampled" if experiment.task == "generation" else config.evaluation.candidates


def _words(
    config: RunConfig, experiment: Experiment, history: HistoryOrder, elsewhere: Elsewhere | None
) -> Sequence[str]:
    if experiment.measure == "similarity":
        return [str(config.output), "--similarity"]
    words = [str(config.output), "--task", experiment.task, "--candidates", _candidates(config, experiment)]
    words += ["--data", str(elsewhere.data), "--unseen", elsewhere.unseen] if elsewhere else []
    return [*words, *(["--shuffle-history"] if history == "shuffled" else [])]
