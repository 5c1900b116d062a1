"""Train and test several systems on one dataset: `python launchers/compare.py PRESET... [section.key=value ...]`.

Each system runs through `launchers/train.py`, teachers and first stages first; one table shows all results. Finished
runs are skipped: run the same command again to resume. A system that fails does not stop the other systems.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from launchers.command import CommandParser, exit_process, run_command
from trainer.config import ConfigError
from trainer.reports.tables import Style
from trainer.workflows.comparing.comparison import compared_runs
from trainer.workflows.comparing.running import forecast, run_comparison
from trainer.workflows.comparing.sweep import seed_axis
from trainer.workflows.comparing.table import Outcome, record, seeds_table, table


def main(arguments: Sequence[str], prog: str = "compare.py") -> None:
    """Run the systems that are not finished, and print the table of all results.

    Raises:
        ValueError: the arguments are invalid, or a system failed (the other systems were still run).
    """
    options = _parse(arguments, prog)
    presets = [Path(word) for word in options.words if "=" not in word]
    axes = [*options.sweep, *(seed_axis(options.seeds) if options.seeds is not None else [])]
    runs = compared_runs(presets, [word for word in options.words if "=" in word], axes)
    if options.dry_run:
        print("\n".join(forecast(runs, options.ranks)))
        return
    outcomes: list[Outcome] = []
    results = run_comparison(runs, options.ranks)
    for number, run in enumerate(runs, 1):
        print(f"== {number}/{len(runs)} {run.name}: {run.config.output}", file=sys.stderr)
        try:
            outcomes.append(next(results))
        except KeyboardInterrupt:
            raise KeyboardInterrupt("the same command resumes; finished runs are not repeated") from None
    document = json.dumps([record(outcome, runs) for outcome in outcomes], indent=1) + "\n"
    print(document if options.json else _tables(outcomes, "text", swept=bool(axes)), end="")
    for path in options.out:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(document if path.suffix == ".json" else _tables(outcomes, "markdown", swept=bool(axes)))
    failed = [outcome for outcome in outcomes if outcome.error]
    for outcome in failed:
        print(f"{outcome.run.name} failed: {outcome.error}", file=sys.stderr)
    if failed:
        raise ValueError(f"{len(failed)} of {len(runs)} systems failed: fix them and run the same command again")


def _tables(outcomes: Sequence[Outcome], style: Style, *, swept: bool) -> str:
    """All runs, and of a sweep the means over seeds below them."""
    return "\n".join([table(outcomes, style), *([seeds_table(outcomes, style)] if swept else [])])


def _parse(arguments: Sequence[str], prog: str) -> argparse.Namespace:
    parser = CommandParser(prog=prog, description=__doc__.split("\n")[0])
    parser.add_argument(
        "words", nargs="+", metavar="PRESET|section.key=value",
        help="presets, and overrides for those whose system has the key; NAME:section.key=value overrides one preset "
        "only; output=FOLDER puts each run into FOLDER/NAME",
    )  # fmt: skip
    parser.add_argument("--ranks", type=int, default=1, help="processes per run, started by DeepSpeed")
    parser.add_argument("--seeds", type=int, metavar="N", help="train everything with the seeds 0 to N - 1")
    parser.add_argument(
        "--sweep", action="append", default=[], metavar="KEY=V1,V2",
        help="train every value, and every combination where it is repeated; NAME:section.key=v1,v2: of one preset",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="list what would run, what is finished, what is missing")
    parser.add_argument("--json", action="store_true", help="print the results as JSON instead of a table")
    parser.add_argument(
        "--out", type=Path, action="append", default=[], metavar="FILE", help="also write them to FILE.md or FILE.json"
    )
    options = parser.parse_intermixed_args(arguments)
    if all("=" in word for word in options.words):
        raise ConfigError("give at least one preset, for example trainer/presets/sasrec.yaml")
    if options.ranks < 1:
        raise ConfigError(f"--ranks {options.ranks}: give the number of processes")
    if wrong := [path for path in options.out if path.suffix not in (".md", ".json")]:
        raise ConfigError(f"--out {wrong[0]}: give a file that ends in .md or .json")
    return options


if __name__ == "__main__":
    exit_process(run_command(main))
