"""Run the application until a signal stops it."""

from __future__ import annotations

import signal
import socket
import sys

import uvicorn

from trainer.runs.preflight import SavedRun
from trainer.workflows.serving.answering import Answerer
from trainer.workflows.serving.app import create_app
from trainer.workflows.serving.settings import LOCAL, ServeSettings

_SWITCH = 5e-4
"""Seconds that a thread may keep the interpreter while another one waits for it."""
_GRACE = 30
"""Seconds that open requests have after a signal."""


def serve(saved: SavedRun, bound: socket.socket, settings: ServeSettings, threads: int | None = None) -> None:
    """Load a run and answer requests; returns after SIGTERM or Ctrl-C, once open requests are answered.

    Args:
        bound: where to listen, from `bind`.
        threads: CPU threads of the model; None: as the run was configured.
    """
    # Two threads share the interpreter. By default one that computes in Python lets the other wait 5 ms, as often as it
    # sends or receives: about once per request.
    sys.setswitchinterval(_SWITCH)
    answerer = Answerer(saved, settings.batch, threads)
    config = uvicorn.Config(
        create_app(answerer, settings),
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=settings.connections,
        timeout_graceful_shutdown=_GRACE,
    )
    bound.listen(config.backlog)  # whoever reads the next line may connect
    host, port = bound.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(f"serving {saved.config.output} on http://{shown}:{port}", flush=True)
    if host not in (LOCAL, "::1"):
        print(f"anyone who reaches {shown} can ask: put it behind a proxy with a login", file=sys.stderr)
    # uvicorn stops on SIGTERM, and then raises it again: ending as asked is no failure of the command.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    uvicorn.Server(config).run(sockets=[bound])
