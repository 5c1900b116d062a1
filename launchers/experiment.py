"""Run one of the paper's experiments: `python launchers/experiment.py NAME --data DIR [--recipe NAME] [--seeds 3] ...`.

NAME is a table or figure of the paper (`table3`, `figure4`) or a YAML file. Trainings are shared between experiments,
finished ones are not repeated, and a system that fails does not stop the others: run the same command again to resume.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from launchers.command import exit_process, run_command
from trainer.config.presets import names_in
from trainer.workflows.experiments.experiment import Asked, describe, prepare, run


def main(arguments: Sequence[str], prog: str = "experiment.py") -> None:
    """Run what is missing, and write and print the table.

    Raises:
        ValueError: the experiment cannot be run, or one of its runs failed (the others were still run).
    """
    options = _parser(prog).parse_args(arguments)
    asked = Asked(
        name=options.name,
        data=options.data,
        recipe=options.recipe,
        systems=tuple(options.systems),
        seeds=options.seeds,
        one_source=options.one_teacher,
        options=tuple(options.option),
        overrides=tuple(options.set),
        root=options.runs,
    )
    plan = prepare(asked, options.ranks)
    if options.dry_run:
        print(describe(plan))
        return
    folder = options.out or options.runs / "results" / f"{asked.name.stem}-{plan.budget.manifest.name}"
    try:
        report, files = run(asked.name.stem, plan, folder, options.ranks, say=lambda line: print(line, file=sys.stderr))
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the same command resumes; finished runs are not repeated") from None
    print(report.markdown())
    print("\n".join(map(str, files)))
    if report.failed:
        raise ValueError(
            f"{len(report.failed)} of {len(plan.runs)} runs failed: fix them and run the same command again"
        )


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=__doc__.split("\n")[0])
    parser.add_argument("name", type=Path, metavar="NAME", help=f"{', '.join(names_in('experiments'))}, or a YAML file")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="dataset folder")
    parser.add_argument("--recipe", type=Path, default=Path("paper"), metavar="NAME",
        help=f"how each system is trained: {', '.join(names_in('recipes'))}, or a YAML file")  # fmt: skip
    parser.add_argument("--systems", nargs="+", default=[], metavar="NAME", help="some of the experiment's systems")
    parser.add_argument("--seeds", type=int, default=1, help="train everything with the seeds 0 to N - 1")
    parser.add_argument("--one-teacher", action="store_true",
        help="train teachers and first stages with seed 0 alone, for all seeds of what builds on them")  # fmt: skip
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE",
        help="a setting of all runs that have the key; NAME:section.key=value: of one system; repeat")  # fmt: skip
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE",
        help="a choice that the paper leaves open; --dry-run lists those of the experiment; repeat")  # fmt: skip
    parser.add_argument("--runs", type=Path, default=Path("runs/experiments"), metavar="DIR",
        help="folder of the runs that all experiments share (default: runs/experiments)")  # fmt: skip
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of the results (default: RUNS/results/NAME-DATASET)"
    )
    parser.add_argument("--ranks", type=int, default=1, help="processes per run, started by DeepSpeed")
    parser.add_argument("--dry-run", action="store_true", help="list every run, what is done, and what the rest costs")
    return parser


if __name__ == "__main__":
    exit_process(run_command(main))
