"""Evaluate a trained run: `python launchers/evaluate.py RUN [--split valid test] [--candidates sampled|full] ...`.

Runs in one process, or on several ranks through `deepspeed launchers/evaluate.py RUN ...`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from launchers.command import CommandParser, exit_process, run_command, show_progress
from trainer.api import Run
from trainer.config import Candidates, EvaluationConfig, HistoryOrder, Split, Task, UnseenItems
from trainer.runs.other_dataset import check_other, is_own
from trainer.runs.preflight import SavedRun, check_saved_run
from trainer.runs.requirements import check_task

if TYPE_CHECKING:
    from trainer.distributed import World
    from trainer.reports.results import Result


def main(arguments: Sequence[str], prog: str = "evaluate.py") -> None:
    """Evaluate the best checkpoint, print the results, and append them to RUN/results.jsonl unless on a sample."""
    parser = CommandParser(prog=prog, description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument(
        "--split",
        nargs="+",
        choices=get_args(Split),
        default=["test"],
        help="both at once cost less than two calls",
    )
    parser.add_argument("--task", choices=get_args(Task), help="default: the task of the run")
    parser.add_argument("--candidates", choices=get_args(Candidates), help="default: evaluation.candidates of the run")
    parser.add_argument(
        "--shuffle-history", action="store_true", help="shuffle titles and vectors; numbers and dates stay"
    )
    parser.add_argument(
        "--similarity",
        action="store_true",
        help="instead, the cosine of users' vectors for the original and the shuffled history",
    )
    parser.add_argument("--data", type=Path, help="the run's dataset, if it has moved; or one of other items")
    parser.add_argument(
        "--unseen", choices=get_args(UnseenItems), default="mean", help="their item vectors (with --data)"
    )
    parser.add_argument("--users", type=int, help="a seeded sample of this many users; printed, not recorded")
    parser.add_argument("--json", action="store_true", help="print one JSON object per line and result")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    options = parser.parse_args(arguments)
    show_progress()
    if options.users is not None and options.users < 1:
        raise ValueError(f"--users {options.users}: give the number of users to sample")
    if options.data and is_own(options.data, options.run):
        saved, options.data = check_saved_run(options.run, options.data), None
    else:
        saved = check_saved_run(options.run)
    settings = saved.config.evaluation
    if options.candidates:
        settings = settings.model_copy(update={"candidates": options.candidates})
    if options.users:
        settings = settings.model_copy(update={"users": options.users})
    check_task(saved.config, options.task or saved.config.task, settings)
    if options.data:
        check_other(options.data, saved.manifest)
        if options.similarity:
            raise ValueError("--similarity is of the run's own dataset: leave out --data")
    (_similarity if options.similarity else _ranking)(saved, settings, options)


def _ranking(saved: SavedRun, settings: EvaluationConfig, options: argparse.Namespace) -> None:
    from trainer.distributed import start, stop
    from trainer.reports.list_tables import beyond_accuracy
    from trainer.reports.tables import comparison

    history: HistoryOrder = "shuffled" if options.shuffle_history else "original"
    world = start(saved.config.engine.threads)
    try:
        if options.data:
            results = _elsewhere(saved, world, settings, options, history)
        else:
            wanted: dict[str, Any] = {"candidates": options.candidates, "users": options.users, "task": options.task}
            found = Run(saved).evaluate(options.split, history=history, record=not options.users, **wanted)
            results = list(found.values())
    finally:
        stop()
    if not world.is_main:
        return
    if options.json:
        print("\n".join(json.dumps(asdict(result)) for result in results))
    else:
        print(comparison(results) + beyond_accuracy(results), end="")


def _elsewhere(
    saved: SavedRun, world: World, settings: EvaluationConfig, options: argparse.Namespace, history: HistoryOrder
) -> list[Result]:
    from trainer.workflows.experiments.transfer import evaluate_elsewhere, record_elsewhere

    measured = evaluate_elsewhere(
        saved, world, settings, options.data, options.unseen, splits=options.split, history=history
    )
    if world.is_main and not options.users:
        for found in measured:
            record_elsewhere(saved.config.output, found, options.unseen)
    return [found.result for found in measured]


def _similarity(saved: SavedRun, settings: EvaluationConfig, options: argparse.Namespace) -> None:
    from trainer.distributed import start, stop
    from trainer.workflows.experiments.similarity import similarity

    world = start(saved.config.engine.threads)
    try:
        lines = similarity(saved, world, settings, options.split, keep=not options.users)
    finally:
        stop()
    if world.is_main:
        print("\n".join(lines))


if __name__ == "__main__":
    exit_process(run_command(main))
