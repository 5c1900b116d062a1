"""Print the results of runs side by side: `python launchers/report.py RUN_DIR... [--markdown]`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from launchers.command import CommandParser, exit_process, run_command
from trainer.config import Candidates, Split
from trainer.reports.results import RESULTS_FILE
from trainer.reports.tables import METRICS
from trainer.workflows.report import report


def main(arguments: Sequence[str] | None = None, prog: str = "report.py") -> int:
    """Print the table; returns exit code 0, or 2 after a one-line error that names what is missing and the cure."""
    options = _parse(arguments, prog)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        table = report(
            list(dict.fromkeys(options.runs)),
            options.split,
            options.candidates,
            metrics=options.metrics,
            popularity=options.popularity,
            against=options.against,
            style="markdown" if options.markdown else "text",
        )
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table, end="")
    return 0


def _parse(arguments: Sequence[str] | None, prog: str) -> argparse.Namespace:
    parser = CommandParser(
        prog=prog,
        description="Compare runs: metrics with 95 % intervals, and how much they drop when histories are shuffled.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help=f"run folder with a {RESULTS_FILE}")
    parser.add_argument("--split", choices=get_args(Split), default="test")
    parser.add_argument("--candidates", choices=get_args(Candidates), default="sampled")
    parser.add_argument(
        "--metrics",
        type=lambda names: tuple(name for name in names.split(",") if name),
        metavar="NAME,...",
        help=f"comma-separated (default {','.join(METRICS['retrieval'])}; HR@1 for title generation)",
    )
    parser.add_argument("--popularity", action="store_true", help="add a row for ranking by popularity in training")
    parser.add_argument(
        "--against",
        type=Path,
        metavar="RUN_DIR",
        help="one of the runs: print its difference to every other row, paired over users",
    )
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    exit_process(run_command(main))
