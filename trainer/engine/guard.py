"""Ends a rank whose interpreter is stuck, and has its stacks written.

No thread of a rank runs while one of them holds the interpreter lock, neither the watchdog nor a signal handler of
Python. So a tiny process sits beside each rank. The watchdog tells it about twice a second how long it may be silent;
once it has been silent for longer, SIGABRT makes `faulthandler`, which is C, write the stacks and ends the rank.
(`faulthandler.dump_traceback_later` would also end a healthy rank that was suspended, at the moment it resumes.)

The file is run as a script in a bare interpreter, so it imports nothing but the standard library.
"""

from __future__ import annotations

import os
import select
import signal
import struct
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

_MESSAGE = struct.Struct("d")
_TICK = 0.25
_LAST = 10.0
"""Seconds that a rank gets to write its stacks, before SIGKILL."""


class Guard:
    """The guard of this process, while the context is active.

    Args:
        rank: how messages name this process.
        stacks: file that messages name; `faulthandler` writes to it.
    """

    def __init__(self, rank: int, stacks: Path) -> None:
        self._words = [sys.executable, "-I", "-S", __file__, str(os.getpid()), str(rank), str(stacks)]
        self._pipe = -1
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        with suppress(OSError):  # out of processes: the run continues without its guard
            self._process = subprocess.Popen(self._words, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
            assert self._process.stdin is not None
            self._pipe = self._process.stdin.fileno()
            os.set_blocking(self._pipe, False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process and self._process.stdin:
            self._process.stdin.close()
            self._process.wait()

    def alive(self, allowed: float) -> None:
        """Tell the guard that this process runs; the next call comes within `allowed` seconds."""
        with suppress(OSError):  # killed or stopped: the run continues without it
            os.write(self._pipe, _MESSAGE.pack(allowed))


def _guard(process: int, rank: str, stacks: str) -> None:
    """Watch a process until it ends; the script's entry."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # Slurm and terminals signal all processes of a run
        signal.signal(number, signal.SIG_IGN)
    allowed, silent = float("inf"), 0.0
    while silent <= allowed:
        if not select.select([0], [], [], _TICK)[0]:
            # Counted, not measured: if the whole run is suspended, so is this process.
            silent += _TICK if _runs(process) else 0.0
            continue
        message = os.read(0, 512 * _MESSAGE.size)
        if not message:
            return  # the rank has ended
        allowed, silent = _MESSAGE.unpack(message[-_MESSAGE.size :])[0], 0.0
    reason = f"rank {rank} is stuck: nothing else could run in its interpreter for {silent:.0f} s"
    with suppress(OSError), open(stacks, "a") as file:
        print(reason, file=file)
    print(f"error: {reason}; its stacks are in {stacks}", file=sys.stderr, flush=True)
    _end(process)


def _runs(process: int) -> bool:
    """Whether the process is not stopped, as by SIGSTOP."""
    with suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "Tt"
    return False


def _end(process: int) -> None:
    for number in (signal.SIGABRT, signal.SIGKILL):
        if os.getppid() == process:  # still the parent, so the id is its own
            os.kill(process, number)
        end = time.monotonic() + _LAST
        while os.getppid() == process and time.monotonic() < end:
            time.sleep(_TICK)


if __name__ == "__main__":
    _guard(int(sys.argv[1]), sys.argv[2], sys.argv[3])
