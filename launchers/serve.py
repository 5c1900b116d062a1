"""Serve recommendations of an export or a run over HTTP.

llm-srec serve EXPORT                  http://127.0.0.1:8000 has a page to try it
llm-srec serve RUN --port 8001         a run folder can be served as well
curl localhost:8000/recommend --json '{"history": ["Fargo (1996)", "50"], "k": 5}'

POST /recommend answers like `llm-srec recommend --json`; GET /items?search=TEXT finds titles, /health and /metrics (in
the format of Prometheus) tell how it is. It listens on this machine alone unless --host says otherwise.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from launchers.command import CommandParser, exit_process, run_command, show_progress
from trainer.runs.preflight import check_loadable
from trainer.workflows.serving.settings import LOCAL, ServeSettings, bind, check_serves


def main(arguments: Sequence[str], prog: str = "serve.py") -> None:
    """Serve until Ctrl-C or SIGTERM."""
    options = _parser(prog).parse_args(arguments)
    show_progress()
    saved = check_loadable(options.run, options.llm, options.data)
    settings = ServeSettings(
        options.queue, options.batch, options.history, options.top, options.body, options.connections
    )
    check_serves(saved, settings)
    if options.threads is not None and options.threads < 1:
        raise ValueError(f"--threads {options.threads}: give at least 1")
    with bind(options.host, options.port) as bound:
        from trainer.workflows.serving.server import serve  # imports torch

        serve(saved, bound, settings, options.threads)


def _parser(prog: str) -> argparse.ArgumentParser:
    default = ServeSettings()
    parser = CommandParser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="export or run folder")
    parser.add_argument("--data", type=Path, metavar="DIR", help="the run's dataset, if it has moved")
    parser.add_argument("--llm", metavar="PATH", help="the run's language model or text encoder, if it has moved")
    parser.add_argument("--host", default=LOCAL, help=f"address to listen on (default {LOCAL}: this machine alone)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes any free port (default 8000)")
    parser.add_argument("--threads", type=int, help="CPU threads of the model (default: as the run was configured)")
    for name, what in (
        ("queue", "requests that wait for the model; further ones get 503 with Retry-After"),
        ("batch", "most requests that the model answers together"),
        ("history", "most items of a history"),
        ("top", "most items that can be asked for"),
        ("body", "most bytes of a request"),
        ("connections", "most open connections"),
    ):
        parser.add_argument(f"--{name}", type=int, default=getattr(default, name), help=f"{what} (default %(default)s)")
    return parser


if __name__ == "__main__":
    exit_process(run_command(main))
