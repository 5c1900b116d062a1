"""What the commands share: errors as one line, and how a process ends."""

from __future__ import annotations

import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import NoReturn


_HEAD_START = 3.0
"""Seconds that a rank which reports nothing leaves to the one that does: launchers end all ranks once one has failed."""


def run_command(command: Callable[[Sequence[str]], int | None]) -> int:
    """Exit code of a command, which gets the words of the command line: its own, or 0 where it returns none.

    An error that its user can mend gives 2 and is told in one line, without a traceback.
    """
    _silence()
    try:
        code = command(sys.argv[1:])
    except (ValueError, OSError) as error:
        if os.environ.get("TRACEBACK"):  # for those who look for a bug
            raise
        # Ranks meet the same error; one per node reports it.
        if os.environ.get("RANK", "0") == "0" or os.environ.get("LOCAL_RANK") == "0":
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        else:
            time.sleep(_HEAD_START)
        return 2
    except KeyboardInterrupt:
        print("interrupted; start the same command again to go on from the last checkpoint", file=sys.stderr)
        return 130
    except Exception:  # noqa: BLE001 - a bug; told here because `exit_process` ends one of several ranks at once
        traceback.print_exc()
        return 1
    return code or 0


def exit_process(code: int) -> NoReturn:
    """End the process.

    One of several ranks ends at once: everything is written and closed by now, and while threads of the collective
    library wait for ranks that have left, the interpreter's orderly end now and then aborts.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _silence() -> None:
    """Warnings that are about libraries' use of each other: nobody who runs a command can act on them."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.|deepspeed\.|transformers\.")
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # about 4-bit kernels, which nothing here uses
