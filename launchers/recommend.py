"""Recommend items to users of a run's dataset, or after any history.

llm-srec recommend RUN --user 196 22              users of the dataset
llm-srec recommend RUN --all --out all.parquet    all of them
llm-srec recommend RUN --history "Fargo (1996)" 50    anyone, by what they have seen: titles or item ids, oldest first
llm-srec recommend RUN --histories FILE.jsonl     many: one list per line, or {"history": [...], "times": [...]}
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from launchers.command import CommandParser, exit_process, run_command, show_progress
from trainer.api import load_run
from trainer.data.raw.history import History, Unknown
from trainer.data.raw.parsing import STDIN, read_history_lines, read_lines
from trainer.workflows.recommending.output import Format, check_output, write


def main(arguments: Sequence[str], prog: str = "recommend.py") -> None:
    """Print or write the items that score best after each history."""
    options = _parser(prog).parse_args(arguments)
    show_progress()
    if options.top < 1:
        raise ValueError(f"--top {options.top}: ask for at least 1 item")
    wanted = check_output(options.out, "jsonl" if options.json else options.format)
    if options.times and not options.history:
        raise ValueError("--times are those of --history: give both")
    run = load_run(options.run, llm=options.llm, data=options.data)
    answers = run.recommend_each(
        _histories(options),
        users="all" if options.all else read_lines(options.users_file, "users") if options.users_file else options.user,
        k=options.top,
        exclude_seen=options.exclude_seen,
        candidates=read_lines(options.candidates, "items") if options.candidates else None,
        unknown=options.unknown,
        progress=True,
    )
    count = write(answers, options.out, wanted)
    if options.out:
        print(f"{options.out}: recommendations after {count:,} histories", file=sys.stderr)


def _histories(options: argparse.Namespace) -> list[History] | None:
    if options.histories:
        return read_history_lines(options.histories)
    if options.history:
        items = read_lines(STDIN, "items") if options.history == ["-"] else options.history
        return [History(items, options.times)]
    return None


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = CommandParser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder, or an export")
    parser.add_argument("--data", type=Path, metavar="DIR", help="the run's dataset, if it has moved")
    parser.add_argument("--llm", metavar="PATH", help="the run's language model or text encoder, if it has moved")
    who = parser.add_mutually_exclusive_group(required=True)
    who.add_argument("--user", nargs="+", action="extend", metavar="ID", help="raw user ids, as in the reviews")
    who.add_argument("--users-file", type=Path, metavar="FILE", help="raw user ids, one per line; - is standard input")
    who.add_argument("--all", action="store_true", help="all users of the dataset")
    who.add_argument(
        "--history", nargs="+", metavar="ITEM", help="ids or titles, oldest first; - reads them from stdin"
    )
    who.add_argument("--histories", type=Path, metavar="FILE", help="JSON lines with a history each; - is stdin")
    parser.add_argument("--times", nargs="+", metavar="TIME", help="of --history: 2024-05-31, or seconds since 1970")
    parser.add_argument("--top", type=int, default=10, help="number of items (default 10)")
    parser.add_argument(
        "--exclude-seen", action="store_true", default=True, help="leave out items of the history (default)"
    )
    parser.add_argument("--include-seen", dest="exclude_seen", action="store_false", help="rank them too")
    parser.add_argument(
        "--candidates", type=Path, metavar="FILE", help="rank these items only: an id or title per line"
    )
    parser.add_argument(
        "--unknown",
        choices=get_args(Unknown),
        default="error",
        help="items of a history that the dataset does not have: refuse them (default), leave them out, or read their "
        "titles (tallrec, recformer)",
    )
    parser.add_argument("--format", choices=get_args(Format), help="default: that of --out's suffix, or text")
    parser.add_argument("--json", action="store_true", help="short for --format jsonl: one JSON object per line")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write to a file (.txt .json .jsonl .parquet)")
    return parser


if __name__ == "__main__":
    exit_process(run_command(main))
