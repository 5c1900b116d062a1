"""Evaluate a run's best checkpoint and record the results."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trainer.config import EvaluationConfig, HistoryOrder, RunConfig, Split, Task, config_hash, extensions
from trainer.data.reading.counter_rng import IntArray
from trainer.device import describe, peak_memory_bytes
from trainer.distributed import World
from trainer.engine.engine import Engine
from trainer.evaluation.beyond import (
    COVERAGE,
    JACCARD,
    LIST_LENGTH,
    TrainingFacts,
    coverage,
    jaccard,
    list_metrics,
)
from trainer.evaluation.protocol import Evaluation, Evaluator, Ranking
from trainer.evaluation.ranking import Floats
from trainer.evaluation.training_facts import training_facts
from trainer.reports.list_tables import beyond_accuracy
from trainer.reports.results import RESULTS_FILE, Result, append, read, utc_now
from trainer.reports.tables import comparison
from trainer.reports.user_ranks import UserRanks, read_ranks, write_ranks
from trainer.runs.commit import git_commit
from trainer.runs.folder import Progress, RunFolder
from trainer.runs.preflight import SavedRun
from trainer.workflows.board import show_test
from trainer.workflows.item_vectors import item_vector_file
from trainer.workflows.load_run import load_run

log = logging.getLogger(__name__)


def test_best(config: RunConfig, evaluator: Evaluator, engine: Engine[Any, Any], run: RunFolder) -> None:
    """Test the best checkpoint of a finished run on each configured history order that has no result yet."""
    best = run.best()
    file = run.path / RESULTS_FILE
    kind = ("test", evaluator.task, config.evaluation.candidates, config.evaluation.tie)
    found = read(file) if file.is_file() else []
    done = {(r.step, r.history) for r in found if (r.split, r.task, r.candidates, r.tie) == kind}
    missing = [h for h in config.evaluation.test_histories if (best.progress.step, h) not in done]
    if not missing:
        return
    engine.load_weights(best)
    engine.model.eval()
    kept = item_vector_file(config, best, evaluator)
    ranking = evaluator.at_current_weights(
        decode=evaluator.config.decode, kept=kept, list_length=_list_length(evaluator.config)
    )
    for history in missing:
        [measured] = evaluate(config, ranking, best.progress, splits=["test"], history=history)
        if evaluator.world.is_main:
            record(config, measured)
    if evaluator.world.is_main:
        show_test(evaluator, ranking, run, best.progress)


class Measured(NamedTuple):
    """A result, and the ranks of the users behind it."""

    result: Result
    ranks: UserRanks


def evaluate(
    config: RunConfig, ranking: Ranking, progress: Progress, *, splits: Sequence[Split], history: HistoryOrder
) -> list[Measured]:
    """Evaluate each split, in one pass; returns the same results on all ranks."""
    found = ranking.evaluate_together(splits, history)
    facts = training_facts(ranking.evaluator.dataset)
    measured = []
    for split, evaluation in found.items():
        ranks = UserRanks(evaluation.user_T, evaluation.ranks, evaluation.top_TK)
        bare = _result(config, ranking.evaluator, progress, evaluation, split=split, history=history)
        measured.append(Measured(_with_lists(bare, config, evaluation, facts, ranking.evaluator), ranks))
    return measured


def _list_length(settings: EvaluationConfig) -> int:
    return LIST_LENGTH if settings.lists else 0


def _with_lists(
    result: Result, config: RunConfig, evaluation: Evaluation, facts: TrainingFacts, evaluator: Evaluator
) -> Result:
    """Add the metrics, and what the recommended lists show beyond accuracy."""
    more: dict[str, Floats] = {}
    totals = evaluation.over_targets(evaluator.config)
    if evaluation.top_TK.shape[1]:
        more = list_metrics(evaluation.top_TK, facts)
        totals[COVERAGE] = coverage(evaluation.top_TK, evaluator.dataset.num_items)
        original = _original_lists(config.output, result, evaluation) if result.history == "shuffled" else None
        if original is not None:
            more[JACCARD] = jaccard(original, evaluation.top_TK)
    return replace(
        result,
        metrics=evaluation.estimates(evaluator.config, more),
        totals=totals,
        later_training=None if facts.later_share is None else round(facts.later_share, 6),
    )


def _original_lists(run: Path, shuffled: Result, evaluation: Evaluation) -> IntArray | None:
    """(T, K) lists of the same users for their original histories, from the run folder; None if it has none."""
    try:
        kept = read_ranks(run, replace(shuffled, history="original"))
    except ValueError as error:
        log.info("%s is left out: %s", JACCARD, error)
        return None
    rows = np.flatnonzero(np.isin(kept.user_T, evaluation.user_T))
    if not kept.top_TK.shape[1] or not np.array_equal(kept.user_T[rows], evaluation.user_T):
        log.info("%s is left out: the original histories were evaluated without lists, or on fewer users", JACCARD)
        return None
    return kept.top_TK[rows]


def evaluate_run(
    saved: SavedRun,
    world: World,
    settings: EvaluationConfig,
    task: Task | None = None,
    *,
    splits: Sequence[Split],
    history: HistoryOrder,
) -> list[Measured]:
    """Evaluate the best checkpoint of a trained run; every rank calls it and gets the same results.

    Args:
        settings: evaluation settings that replace the run's own.
        task: task whose candidates are ranked; None: the run's own.
        splits: splits to evaluate; duplicates are evaluated once.
    """
    run = load_run(saved, world, settings, task)
    ranking = run.evaluator.at_current_weights(
        decode=settings.decode, kept=run.kept, list_length=_list_length(settings)
    )
    return evaluate(run.config, ranking, run.checkpoint.progress, splits=list(dict.fromkeys(splits)), history=history)


def _result(
    config: RunConfig,
    evaluator: Evaluator,
    progress: Progress,
    evaluation: Evaluation,
    *,
    split: Split,
    history: HistoryOrder,
) -> Result:
    settings: EvaluationConfig = evaluator.config
    counts = set(evaluation.ranks.candidates.tolist())
    return Result(
        run=config.output.name,
        system=config.system.name,
        dataset=evaluator.dataset.manifest.name,
        dataset_fingerprint=evaluator.dataset.manifest.fingerprint,
        config_hash=config_hash(config),
        commit=git_commit(),
        split=split,
        task=evaluator.task,
        candidates=settings.candidates,
        num_candidates=counts.pop() if len(counts) == 1 else None,
        history=history,
        tie=settings.tie,
        extensions=extensions(config.system),
        step=progress.step,
        users=len(np.unique(evaluation.user_T)),
        metrics={},
        seconds=round(evaluation.seconds, 3),
        tokens=evaluation.tokens,
        peak_memory_bytes=peak_memory_bytes(),
        device=describe(),
        created=utc_now(),
    )


def record(config: RunConfig, measured: Measured) -> None:
    """Append a result to the run's results file, and keep the ranks of its users."""
    write_ranks(config.output, measured.result, measured.ranks)
    append(config.output / RESULTS_FILE, measured.result)


def print_results(runs: Sequence[Path], settings: EvaluationConfig) -> None:
    """Print a table of the runs' test results, if there are any."""
    results = []
    for run in runs:
        file = run / RESULTS_FILE
        found = read(file) if file.is_file() else []
        # A run folder may have been moved or copied since: show its current name.
        results += [
            replace(r, run=run.name) for r in found if r.split == "test" and r.candidates == settings.candidates
        ]
    if results:
        sys.stdout.write("\n" + comparison(results) + beyond_accuracy(results))
