"""What launchers tell a process, and free ports; torch-free."""

from __future__ import annotations

import os
import socket


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ranks_started() -> int:
    """How many processes a launcher says it started; 1 without one.

    Raises:
        ValueError: the launcher's environment is incomplete, so that the ranks would wait for each other in vain.
    """
    if "RANK" not in os.environ:
        return 1
    missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise ValueError(f"RANK is set but {missing[0]} is not: start with `deepspeed`, or unset RANK")
    return int(os.environ["WORLD_SIZE"])
