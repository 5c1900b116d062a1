"""Recommend items to a user of the dataset: `python launchers/recommend.py RUN --user ID [--top 10] [--json]`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from launchers.command import CommandParser, exit_process, run_command
from trainer.runs.preflight import check_saved_run
from trainer.runs.requirements import check_recommends

if TYPE_CHECKING:
    from trainer.workflows.recommend import Recommendations


def main(arguments: Sequence[str], prog: str = "recommend.py") -> None:
    """Print the items that score best after the user's whole history, without those in it."""
    parser = CommandParser(prog=prog, description=__doc__)
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--user", required=True, help="raw user id, as in the reviews")
    parser.add_argument("--top", type=int, default=10, help="number of items (default 10)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    if options.top < 1:
        raise ValueError(f"--top {options.top}: ask for at least 1 item")
    saved = check_saved_run(options.run)
    check_recommends(saved.config)

    from trainer.data.reading.dataset import find_user  # late: polars takes a quarter of a second

    find_user(saved.config.data.path, options.user)  # an unknown user fails before torch is imported

    from trainer.distributed import start, stop
    from trainer.workflows.load_run import load_run
    from trainer.workflows.recommend import recommend

    world = start(saved.config.engine.threads)
    try:
        answer = recommend(load_run(saved, world), options.user, options.top)
    finally:
        stop()
    print(json.dumps(asdict(answer), ensure_ascii=False, indent=1) if options.json else _as_text(answer))


def _as_text(answer: Recommendations) -> str:
    lines = [f"user {answer.user}, latest items:"]
    lines += [f"      {seen.date}  {seen.title}" for seen in answer.history[-5:]]
    lines.append("recommended:")
    lines += [f"  {item.rank:>2}  {item.score:9.4f}  {item.title}" for item in answer.recommendations]
    return "\n".join(lines)


if __name__ == "__main__":
    exit_process(run_command(main))
