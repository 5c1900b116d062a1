"""What an experiment measures of a trained run: read from its folder, or made by the evaluation command.

Letters: U users.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shards.manifest import read_manifest
from trainer.config import HistoryOrder, RunConfig
from trainer.evaluation.ranking import METRIC_NAMES, Floats, Ints
from trainer.reports.results import RESULTS_FILE, Result, latest, read
from trainer.reports.user_ranks import read_ranks
from trainer.reports.user_similarity import read_similarity
from trainer.runs.folder import RunFolder
from trainer.workflows.experiments.spec import Experiment
from trainer.workflows.run_comparison import run_launcher

SIMILARITY = "cosine_similarity"
"""The metric of `measure: similarity`."""


@dataclass(frozen=True)
class UserMetrics:
    """Metrics of one run, for every user."""

    user_U: Ints
    """User indices, ascending."""
    value: Mapping[str, Floats]
    """(U,) by metric."""


def check_metrics(experiment: Experiment) -> None:
    """Refuse metrics that are not kept per user.

    Raises:
        ValueError: there is one.
    """
    known = (SIMILARITY,) if experiment.measure == "similarity" else METRIC_NAMES
    if unknown := [name for name in experiment.metrics if name not in known]:
        raise ValueError(f"metric {unknown[0]} is not kept per user: use {', '.join(known)}")


def measure(config: RunConfig, experiment: Experiment, ranks: int) -> str:
    """Make what is missing of a finished run by the evaluation command; returns its error line ("": none)."""
    for history in experiment.histories.values():
        if found_metrics(config, experiment, history) is None:
            code, error = run_launcher("evaluate.py", _words(config, experiment, history), ranks)
            if code or found_metrics(config, experiment, history) is None:
                return error or f"the evaluation ended without results (exit code {code})"
    return ""


def found_metrics(config: RunConfig, experiment: Experiment, history: HistoryOrder) -> UserMetrics | None:
    """What a finished run's folder has of the test on a history order; None if it was not measured yet."""
    step = RunFolder(config.output).best().progress.step
    fingerprint = read_manifest(config.data.path).fingerprint
    if experiment.measure == "similarity":
        cosine = read_similarity(config.output, "test")
        if cosine is None or (cosine.dataset_fingerprint, cosine.step) != (fingerprint, step):
            return None
        return UserMetrics(cosine.user_U, {SIMILARITY: cosine.cosine_U})
    kind = (fingerprint, step, experiment.task, _candidates(config, experiment), history)
    result = next((result for result in _tests(config) if _kind(result) == kind), None)
    if result is None:
        return None
    try:
        ranks = read_ranks(config.output, result)
    except ValueError:  # missing or of another evaluation: evaluating again writes them
        return None
    return UserMetrics(ranks.user_U, {name: ranks.metric(name, result.tie) for name in experiment.metrics})


def _tests(config: RunConfig) -> list[Result]:
    """The newest test results of a run, by its way to treat ties."""
    file = config.output / RESULTS_FILE
    found = read(file) if file.is_file() else []
    return [result for result in latest(found) if (result.split, result.tie) == ("test", config.evaluation.tie)]


def _kind(result: Result) -> tuple[object, ...]:
    return (result.dataset_fingerprint, result.step, result.task, result.candidates, result.history)


def _candidates(config: RunConfig, experiment: Experiment) -> str:
    return "sampled" if experiment.task == "generation" else config.evaluation.candidates


def _words(config: RunConfig, experiment: Experiment, history: HistoryOrder) -> Sequence[str]:
    if experiment.measure == "similarity":
        return [str(config.output), "--similarity"]
    words = [str(config.output), "--task", experiment.task, "--candidates", _candidates(config, experiment)]
    return [*words, *(["--shuffle-history"] if history == "shuffled" else [])]
