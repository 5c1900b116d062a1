"""Run the application until a signal stops it."""

from __future__ import annotations

import logging
import socket
import sys

import uvicorn

from trainer.runs.preflight import SavedRun
from trainer.workflows.serving.answering import Answerer
from trainer.workflows.serving.app import create_app
from trainer.workflows.serving.settings import LOCAL, ServeSettings

log = logging.getLogger(__name__)

_GRACE = 30
"""Seconds that open requests have after a signal."""


def serve(saved: SavedRun, bound: socket.socket, settings: ServeSettings, threads: int | None = None) -> None:
    """Load a run and answer requests; returns after SIGTERM or Ctrl-C, once open requests are answered.

    Args:
        bound: where to listen, from `bind`.
        threads: CPU threads of the model; None: as the run was configured.
    """
    answerer = Answerer(saved, settings.batch, threads)
    config = uvicorn.Config(
        create_app(answerer, settings),
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=settings.connections,
        timeout_graceful_shutdown=_GRACE,
    )
    host, port = bound.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(f"serving {saved.config.output} on http://{shown}:{port}", flush=True)
    if host not in (LOCAL, "::1"):
        print(f"anyone who reaches {shown} can ask: put it behind a proxy with a login", file=sys.stderr)
    uvicorn.Server(config).run(sockets=[bound])
