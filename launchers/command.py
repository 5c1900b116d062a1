"""Shared by all commands: errors in one line, exit codes, silenced warnings."""

from __future__ import annotations

import argparse
import atexit
import faulthandler
import gc
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import NoReturn

from shards.manifest import one_line
from trainer.config.load import keys_named
from trainer.runs.launch_env import set_library_defaults
from trainer.runs.parents import end_with_parents

_GARBAGE_THRESHOLD = 10_000
"""New objects between collections of the garbage collector. With Python's 700 (2,000 since 3.13) it traverses the
objects of torch and transformers, which stay, again and again during their import: a tenth of the time of
`recommend.py`. A training step leaves no garbage for it."""
_HEAD_START = 3.0
"""Seconds that the other ranks leave to the one that prints the error: launchers end all ranks once one has failed."""


def run_command(command: Callable[[Sequence[str]], int | None]) -> int:
    """Run a command with the arguments of the command line; returns its exit code, 0 if it returns None.

    Errors that the user can fix (`ValueError`, `OSError`) are printed in one line without a traceback, and return 2.
    Ctrl-C returns 130, a bug 1 with its traceback. A crash, such as SIGSEGV, writes the stacks of all threads to
    stderr, and the command ends with its launcher.
    """
    _silence()
    gc.set_threshold(_GARBAGE_THRESHOLD)
    set_library_defaults()
    faulthandler.enable(2)  # stderr, by descriptor: a test may have replaced `sys.stderr`
    end_with_parents()
    try:
        code = command(sys.argv[1:])
    except (ValueError, OSError) as error:
        if os.environ.get("TRACEBACK"):  # for debugging
            raise
        # All ranks run into the same error; one per node reports it.
        if _reports():
            print(f"error: {one_line(str(error))}", file=sys.stderr)
        elif "torch" not in sys.modules:  # once ranks have met, they fail together
            time.sleep(_HEAD_START)
        return 2
    except KeyboardInterrupt as interrupt:  # with what the command says about resuming, if anything
        if _reports():
            print("; ".join(["interrupted", *map(str, interrupt.args)]), file=sys.stderr)
        return 130
    except Exception:  # noqa: BLE001 - a bug; printed here because `exit_process` may skip the interpreter's exit
        traceback.print_exc()
        return 1
    return code or 0


def show_progress() -> None:
    """Write the log lines of `trainer.evaluation.progress` to stderr; for commands that keep no log of their own."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("trainer.evaluation.progress")
    logger.setLevel(logging.INFO)
    logger.handlers = [handler]


class CommandParser(argparse.ArgumentParser):
    """Reports a wrong command line in one line, with the setting that an unknown option was probably meant to be."""

    def error(self, message: str) -> NoReturn:
        """Print the error and exit with code 2."""
        words = message.removeprefix("unrecognized arguments: ").split() if "unrecognized" in message else []
        option, _, value = next((word for word in words if word.startswith("--")), "").partition("=")
        name = option.removeprefix("--").replace("-", "_")
        settings = keys_named(name.rpartition(".")[2]) if name else []
        if settings:
            key = name if name in settings else settings[0]
            message += f": write {key}={value or 'VALUE'}, without dashes"
        print(f"error: {message} (options: {self.prog} --help)", file=sys.stderr)
        sys.exit(2)


def exit_process(code: int) -> NoReturn:
    """Exit the process, without the interpreter's cleanup once torch is imported.

    The cleanup takes the modules of torch and transformers apart, which costs a second of CPU time. In one of several
    ranks it also aborts occasionally, while threads of the collective library wait for ranks that have left; such a
    rank leaves out exit handlers, too. Everything is written and closed by then.
    """
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    if alone and "torch" not in sys.modules:
        sys.exit(code)
    if alone:
        atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except OSError as error:  # nobody reads the pipe any more, or the disk is full
        code = code or 2
        print(f"error: standard output: {error}", file=sys.stderr)
    sys.stderr.flush()
    os._exit(code)


def _reports() -> bool:
    """Whether this process reports what happens to all ranks: rank 0, and one on each further node."""
    return os.environ.get("RANK", "0") == "0" or os.environ.get("LOCAL_RANK") == "0"


def _silence() -> None:
    """Silence warnings about how libraries use each other, on which no user of a command can act."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.|deepspeed\.|transformers\.")
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # which peft imports where it is installed
