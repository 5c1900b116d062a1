"""Run one of the paper's experiments: `python launchers/experiment.py NAME --data DIR [--recipe NAME] [--seeds 3] ...`.

NAME is a table or figure of the paper (`table3`, `figure4`) or a YAML file. Trainings are shared between experiments,
finished ones are not repeated, and a system that fails does not stop the others: run the same command again to resume.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from launchers.command import CommandParser, exit_process, run_command
from launchers.experiment_options import add_experiment_options, asked_of
from trainer.config.presets import names_in
from trainer.planner.devices import DeviceKind
from trainer.workflows.experiments.experiment import costs, describe, prepare, run


def main(arguments: Sequence[str], prog: str = "experiment.py") -> None:
    """Run what is missing, and write and print the table.

    Raises:
        ValueError: the experiment cannot be run, or one of its runs failed (the others were still run).
    """
    parser = CommandParser(prog=prog, description=__doc__.split("\n")[0])
    parser.add_argument("name", type=Path, metavar="NAME", help=f"{', '.join(names_in('experiments'))}, or a YAML file")
    add_experiment_options(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", help="results (default: RUNS/results/NAME-DATASET)")
    parser.add_argument("--ranks", type=int, default=1, help="processes per run, started by DeepSpeed")
    parser.add_argument("--kind", choices=get_args(DeviceKind),
        help="say what the planner expects of each LLM run on such devices, before it starts")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="list every run, what is done, and what the rest costs")
    options = parser.parse_args(arguments)
    plan = prepare(asked_of(options.name, options), options.ranks)
    if options.kind:
        print(costs(plan, options.kind, options.ranks), file=sys.stderr)
    if options.dry_run:
        print(describe(plan, options.ranks))
        return
    name: str = options.name.stem
    folder = options.out or options.runs / "results" / f"{name}-{plan.budget.manifest.name}"
    try:
        report, files = run(
            name,
            plan,
            folder,
            options.ranks,
            say=lambda line: print(line, file=sys.stderr),
            command=shlex.join(["llm-srec", "experiment", *arguments]),
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the same command resumes; finished runs are not repeated") from None
    print("\n".join([report.markdown(), *map(str, files)]))
    if report.failed:
        failed = f"{len(report.failed)} of {len(plan.runs)} runs failed"
        raise ValueError(f"{failed}: fix them and run the same command again")


if __name__ == "__main__":
    exit_process(run_command(main))
