"""Ends a rank whose interpreter is stuck, and has its stacks written.

No thread of a rank runs while one of them holds the interpreter lock, neither the watchdog nor a signal handler of
Python. So a tiny process sits beside each rank. The watchdog tells it about twice a second how long it may be silent;
once it has been silent for longer, SIGABRT makes `faulthandler`, which is C, write the stacks and ends the rank.
(`faulthandler.dump_traceback_later` would also end a healthy rank that was suspended, at the moment it resumes.)

A rank that alone was stopped, as by SIGSTOP, is ended too: the other ranks have given it up by then. If the whole run
is suspended, as by `scontrol suspend`, so are the guards.

The file is run as a script in a bare interpreter, so it imports nothing but the standard library.
"""

from __future__ import annotations

import os
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

_MESSAGE = struct.Struct("d")
_TICK = 0.25
_PATIENCE = 5.0
"""Seconds for a line in the file of stacks."""
_LAST = 10.0
"""Seconds that a rank gets to write its stacks, before SIGKILL."""


class Guard:
    """The guard of this process, while the context is active.

    Args:
        rank: how messages name this process.
        stacks: file that messages name; `faulthandler` writes to it.
        alone: whether it is the only rank. One may stop it and let it go on: nobody waits for it.
    """

    def __init__(self, rank: int, stacks: Path, *, alone: bool) -> None:
        words = [os.getpid(), rank, stacks, int(alone)]
        self._words = [sys.executable, "-I", "-S", __file__, *map(str, words)]
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


def _guard(process: int, rank: str, stacks: str, *, alone: bool) -> None:
    """Watch a process until it ends; the script's entry."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # Slurm and terminals signal all processes of a run
        signal.signal(number, signal.SIG_IGN)
    allowed, silent = float("inf"), 0.0
    while silent <= allowed:
        stopped = _is_stopped(process)
        if not select.select([0], [], [], _TICK)[0]:
            # Counted, not measured: if the whole run is suspended, so is this process.
            silent += 0.0 if stopped and alone else _TICK
            continue
        message = os.read(0, 512 * _MESSAGE.size)
        if not message:
            return  # the rank has ended
        allowed, silent = _MESSAGE.unpack(message[-_MESSAGE.size :])[0], 0.0
    state = "was stopped, as by SIGSTOP," if stopped else "is stuck: nothing else could run in its interpreter"
    reason = f"rank {rank} {state} for {silent:.0f} s"
    print(f"error: {reason}; its stacks are in {stacks}", file=sys.stderr, flush=True)
    writing = threading.Thread(target=_note, args=(stacks, reason), daemon=True)
    writing.start()
    writing.join(_PATIENCE)  # a file system that hangs must not keep the rank alive
    _end(process)


def _note(stacks: str, reason: str) -> None:
    with suppress(OSError), open(stacks, "a") as file:
        print(reason, file=file)


def _is_stopped(process: int) -> bool:
    """Whether the process is stopped, as by SIGSTOP or a debugger."""
    with suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    return False


def _end(process: int) -> None:
    for number in (signal.SIGABRT, signal.SIGKILL):
        if os.getppid() == process:  # still the parent, so the id is its own
            os.kill(process, number)
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGCONT)  # a stopped process dies by SIGABRT only when it continues
        end = time.monotonic() + _LAST
        while os.getppid() == process and time.monotonic() < end:
            time.sleep(_TICK)


if __name__ == "__main__":
    _guard(int(sys.argv[1]), sys.argv[2], sys.argv[3], alone=sys.argv[4] == "1")
