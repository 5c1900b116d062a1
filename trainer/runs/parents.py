"""Ranks end with their launcher: otherwise `kill -9` of it would leave them training, unseen.

A thread looks once a second. The kernel's own signal for this (PR_SET_PDEATHSIG) would come too early, when the thread
that started a rank ends, and not at all when the launcher is not the direct parent: the `deepspeed` command starts
launch.py, which starts the ranks and survives it.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path

log = logging.getLogger(__name__)

PARENT = "LLM_SREC_PARENT"
"""Environment variable with the id of a process that a command is to end with, though it may not be its parent."""
_PERIOD = 1.0
"""Seconds between two looks."""


def end_with_parents() -> None:
    """Send this process SIGTERM, on which training saves and stops, once its launcher is gone.

    Without a launcher nothing is watched: `nohup llm-srec train ... &` outlives its shell.
    """
    parent = os.getppid() if "RANK" in os.environ else None
    others = _started(_deepspeed_command(parent), int(os.environ.get(PARENT, 0)))
    if parent is not None or others:
        threading.Thread(target=_watch, args=(parent, others), name="parents", daemon=True).start()


def _watch(parent: int | None, others: Mapping[int, str]) -> None:
    while parent in (None, os.getppid()) and _started(*others) == others:
        time.sleep(_PERIOD)
    log.warning("the process that started this rank is gone: the run saves and stops")
    os.kill(os.getpid(), signal.SIGTERM)


def _deepspeed_command(parent: int | None) -> int:
    """The `deepspeed` command, if the parent is the launch.py that it started; otherwise 0."""
    if parent is None or b"deepspeed.launcher.launch" not in _read(parent, "cmdline"):
        return 0
    fields = _fields(parent)
    return int(fields[1]) if fields else 0


def _started(*processes: int) -> dict[int, str]:
    """Start times of those processes that run: a process id alone may be used again."""
    found = {process: _fields(process) for process in processes}
    return {process: fields[19] for process, fields in found.items() if fields and fields[0] not in "ZX"}


def _fields(process: int) -> list[str]:
    """The fields of `/proc/PID/stat` from the state on: state, parent, ...; empty if there is no such process."""
    return _read(process, "stat").decode(errors="replace").rpartition(")")[2].split()


def _read(process: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{process}/{name}").read_bytes()
    except OSError:
        return b""
