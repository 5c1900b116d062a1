"""Evaluate a trained run on another dataset, whose items it has not seen (KDD'25, Table 7)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from trainer.config import EvaluationConfig, HistoryOrder, Split, UnseenItems
from trainer.data.reading.dataset import open_dataset
from trainer.distributed import World
from trainer.models.transfer import on_another_catalog
from trainer.reports.results import RESULTS_FILE, append
from trainer.reports.user_ranks import write_ranks
from trainer.runs.other_dataset import check_other, folder_elsewhere
from trainer.runs.preflight import SavedRun
from trainer.workflows.evaluate_run import Measured, evaluate
from trainer.workflows.load_run import load_run


def evaluate_elsewhere(
    saved: SavedRun,
    world: World,
    settings: EvaluationConfig,
    data: Path,
    unseen: UnseenItems,
    *,
    splits: Sequence[Split],
    history: HistoryOrder,
) -> list[Measured]:
    """Evaluate a run's best checkpoint on another dataset; every rank calls it and gets the same results.

    Raises:
        ValueError: the dataset has the run's own items, or the system cannot score others.
    """
    manifest = check_other(data, saved.manifest)
    run = load_run(saved, world, settings)
    dataset = open_dataset(data, full_check=False, manifest=manifest, repeat_dates=run.config.data.repeat_dates)
    scoring = on_another_catalog(run.config, run.system, dataset, unseen)
    evaluator = replace(run.evaluator, dataset=dataset, scoring=scoring)
    run.system.model.to(world.device)
    run.system.model.eval()
    ranking = evaluator.at_current_weights()
    return evaluate(run.config, ranking, run.checkpoint.progress, splits=list(dict.fromkeys(splits)), history=history)


def record_elsewhere(run: Path, measured: Measured, unseen: UnseenItems) -> None:
    """Append a result to the run's results on that dataset, and keep the ranks of its users."""
    folder = folder_elsewhere(run, measured.result.dataset_fingerprint, unseen)
    write_ranks(folder, measured.result, measured.ranks)
    append(folder / RESULTS_FILE, measured.result)
