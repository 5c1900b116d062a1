"""How a process of a build's pool begins. Imports nothing that starts threads, because it sets their number."""

import logging
import multiprocessing
import os
import signal
import sys
import threading


def cores() -> int:
    """Cores that polars may use: those that POLARS_MAX_THREADS says, or those of this process, fewer in a job."""
    if given := os.environ.get("POLARS_MAX_THREADS"):
        return int(given)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def begin(level: int, threads: int) -> None:
    """Set up this process: threads of polars, log lines, and an end with the parent, which alone hears Ctrl-C."""
    os.environ["POLARS_MAX_THREADS"] = os.environ["OMP_NUM_THREADS"] = str(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # A parent that is killed closes nothing that the pool's processes wait for.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
