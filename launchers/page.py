"""Write one HTML page about runs: `python launchers/page.py RUN [RUN ...] [--out page.html]`.

The page needs no network and no other file, so it can be mailed. The first run is compared with each other one.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from launchers.command import CommandParser, exit_process, run_command
from trainer.config import Candidates, Split
from trainer.runs.atomic import write_atomically
from trainer.runs.folder import RunFolder


def main(arguments: Sequence[str], prog: str = "page.py") -> None:
    """Write the page, and print its path."""
    parser = CommandParser(prog=prog, description=__doc__)
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="run folder; the first is compared with the others"
    )
    parser.add_argument("--out", type=Path, help="file to write (default: page.html in the first run's folder)")
    parser.add_argument("--title", help="title of the page (default: the runs' names)")
    parser.add_argument("--split", choices=get_args(Split), default="test")
    parser.add_argument("--candidates", choices=get_args(Candidates), default="sampled")
    parser.add_argument("--popularity", action="store_true", help="add a row for ranking by popularity in training")
    parser.add_argument(
        "--cases", type=int, default=3, metavar="N",
        help="users per rule whose answers are shown (default 3); 0 loads no model",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    if options.cases < 0:
        raise ValueError(f"--cases {options.cases}: give a number of users, 0 for none")
    configs = [RunFolder(path).config() for path in options.runs]  # a wrong path fails before torch is imported
    logging.basicConfig(format="%(levelname)s: %(message)s")

    from trainer.distributed import start, stop
    from trainer.reports.page.render import render
    from trainer.workflows.pages.runs import runs_page

    world = start(configs[0].engine.threads) if options.cases else None
    try:
        page = runs_page(
            options.runs,
            options.split,
            options.candidates,
            title=options.title,
            command=shlex.join(["llm-srec", "page", *arguments]),
            popularity=options.popularity,
            number_of_cases=options.cases,
            world=world,
        )
    finally:
        if world:
            stop()
    out = options.out or options.runs[0] / "page.html"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, render(page))
    print(out)


if __name__ == "__main__":
    exit_process(run_command(main))
