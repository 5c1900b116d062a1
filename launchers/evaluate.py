"""Rank a trained run: `python launchers/evaluate.py RUN [--split valid|test] [--candidates sampled|full] ...`.

Runs in one process, or on several ranks through `deepspeed launchers/evaluate.py RUN ...`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import get_args

from launchers.command import checked_run, leave, run_command
from trainer.config import Task
from trainer.config.needs import check_task


def main(arguments: Sequence[str]) -> None:
    """Evaluate the best checkpoint, append to RUN/results.jsonl (unless on a sample), print the result."""
    parser = argparse.ArgumentParser(prog="evaluate.py", description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--split", choices=("valid", "test"), default="test")
    parser.add_argument("--task", choices=get_args(Task), help="the run's own unless given")
    parser.add_argument("--candidates", choices=("sampled", "full"), help="the run's own setting unless given")
    parser.add_argument(
        "--shuffle-history", action="store_true", help="titles and vectors move, numbers and dates stay"
    )
    parser.add_argument("--users", type=int, help="a seeded sample of this many users; printed, not recorded")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    options = parser.parse_args(arguments)
    if options.users is not None and options.users < 1:
        raise ValueError(f"--users {options.users}: give the number of users to sample")
    config, _ = checked_run(options.run)
    settings = config.evaluation
    if options.candidates:
        settings = settings.model_copy(update={"candidates": options.candidates})
    if options.users:
        settings = settings.model_copy(update={"users": options.users})
    check_task(config, options.task or config.task, settings)

    from launchers.testing import evaluate, record
    from launchers.trained import open_run
    from trainer.device import start, stop
    from trainer.reports.tables import comparison

    world = start()
    try:
        trained = open_run(options.run, world, settings, options.task)
        item_ND = trained.evaluator.encode_items(trained.model)
        result = evaluate(
            trained.config,
            trained.evaluator,
            trained.model,
            item_ND,
            trained.checkpoint.progress,
            split=options.split,
            history="shuffled" if options.shuffle_history else "original",
        )
        if world.is_main:
            if not options.users:
                record(trained.config, result)
            print(
                json.dumps(asdict(result)) if options.json else comparison([result]),
                end="\n" if options.json else "",
            )
    finally:
        stop()


if __name__ == "__main__":
    leave(run_command(main))
