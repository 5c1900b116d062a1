"""Audit how much a model depends on order: `python launchers/audit.py RUN`, or `--arrays FILE...` for any other model.

docs/audit.md has the schema of the arrays.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from launchers.command import CommandParser, exit_process, run_command, show_progress
from trainer.runs.atomic import atomic_file
from trainer.workflows.audit.preflight import check_audited


def main(arguments: Sequence[str], prog: str = "audit.py") -> None:
    """Print one page: what shuffling changes in accuracy, lists and vectors, for all users and for groups."""
    options = _parse(arguments, prog)
    show_progress()
    _check(options)
    if options.arrays is not None:
        from trainer.workflows.audit.arrays import read_arrays

        given = read_arrays(options.arrays, options.name or options.arrays[0].stem)
        is_main = True
    else:
        saved, other = check_audited(options.run, options.trained_shuffled)
        settings = saved.config.evaluation.model_copy(update={"users": options.users or saved.config.evaluation.users})

        from trainer.distributed import start, stop
        from trainer.workflows.audit.run import run_input

        world = start(saved.config.engine.threads)
        try:
            given, is_main = run_input(saved, world, settings, other), world.is_main
        finally:
            stop()
    if not is_main:
        return
    from trainer.evaluation.order.audit import audit
    from trainer.reports.audit_text import audit_json, audit_page
    from trainer.reports.page.audit import page_of_audit
    from trainer.reports.page.render import render

    found = audit(given, options.seed)
    if options.out is not None:
        html = render(page_of_audit(found, shlex.join(["llm-srec", "audit", *arguments])))
        for suffix, text in ((".json", audit_json(found)), (".md", audit_page(found, "markdown")), (".html", html)):
            with atomic_file(options.out.with_name(options.out.name + suffix)) as beside:
                beside.write_text(text, encoding="utf-8")
    print(audit_json(found) if options.json else audit_page(found, "markdown" if options.markdown else "text"), end="")


def _check(options: argparse.Namespace) -> None:
    """Refuse options that contradict each other, before anything is read."""
    if (options.run is None) == (options.arrays is None):
        raise ValueError("give a run folder or --arrays FILE..., one of the two")
    if options.arrays is not None and (options.trained_shuffled or options.users):
        raise ValueError("--trained-shuffled and --users are for runs: put the arrays of that model, or of those users")
    if options.users is not None and options.users < 1:
        raise ValueError(f"--users {options.users}: give the number of users to sample")
    if options.out is not None and not options.out.absolute().parent.is_dir():
        raise ValueError(f"--out {options.out}: {options.out.absolute().parent} is not a folder: create it")


def _parse(arguments: Sequence[str], prog: str) -> argparse.Namespace:
    parser = CommandParser(prog=prog, description="Audit how much a model depends on the order of histories.")
    parser.add_argument("run", type=Path, nargs="?", help="run folder")
    parser.add_argument("--arrays", type=Path, nargs="+", metavar="FILE", help="npz, safetensors or parquet files")
    parser.add_argument("--name", help="of the model in --arrays (default: the first file's name)")
    parser.add_argument(
        "--trained-shuffled", type=Path, metavar="RUN", help="the same system, trained on shuffled histories"
    )
    parser.add_argument("--users", type=int, help="a seeded sample of this many users of the run's dataset")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (default 0)")
    parser.add_argument("--out", type=Path, metavar="PATH", help="also write PATH.json, PATH.md and PATH.html")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    return parser.parse_args(arguments)


if __name__ == "__main__":
    exit_process(run_command(main))
