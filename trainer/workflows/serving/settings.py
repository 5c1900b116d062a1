"""Where a server listens, and what it refuses; torch-free."""

from __future__ import annotations

import importlib.util
import socket
from dataclasses import dataclass, fields

from trainer.config import ConfigError
from trainer.runs.preflight import SavedRun
from trainer.runs.requirements import check_recommends

LOCAL = "127.0.0.1"


@dataclass(frozen=True)
class ServeSettings:
    """Limits of a server. A request beyond one is answered with 4xx or 503, and costs no model time."""

    queue: int = 1024
    """Requests that wait for the model; further ones are answered with 503 and Retry-After."""
    batch: int = 64
    """Most requests that the model answers together."""
    history: int = 1000
    """Most items of a history."""
    top: int = 100
    """Most items that can be asked for."""
    body: int = 256 * 1024
    """Most bytes of a request."""
    connections: int = 4096
    """Open connections; further ones are answered with 503."""


def check_serves(saved: SavedRun, settings: ServeSettings) -> None:
    """Check that a run can be served with these settings, before torch is imported.

    Raises:
        ConfigError: it cannot; the message names the cure.
    """
    check_recommends(saved.config)
    for field in fields(settings):
        if (value := getattr(settings, field.name)) < 1:
            raise ConfigError(f"--{field.name} {value}: give at least 1")
    for module in ("fastapi", "uvicorn"):
        if importlib.util.find_spec(module) is None:
            raise ConfigError(f"serving needs {module}: pip install 'llm-srec-trainer[serve]'")


def bind(host: str, port: int) -> socket.socket:
    """A socket at this address, which does not listen yet: a taken port shows before the model is loaded.

    Raises:
        ConfigError: the address cannot be used.
    """
    if not 0 <= port < 2**16:  # which the system would wrap around
        raise ConfigError(f"--port {port}: give a number from 0 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"--host {host} --port {port}: {error}") from None
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise ConfigError(f"cannot listen on {host} port {port} ({error}): choose another --port") from None
    return bound
