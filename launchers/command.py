"""Shared by all commands: errors in one line, exit codes, silenced warnings."""

from __future__ import annotations

import argparse
import faulthandler
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

_HEAD_START = 3.0
"""Seconds that the other ranks leave to the one that prints the error: launchers end all ranks once one has failed."""


def run_command(command: Callable[[Sequence[str]], int | None]) -> int:
    """Run a command with the arguments of the command line; returns its exit code, 0 if it returns None.

    Errors that the user can fix (`ValueError`, `OSError`) are printed in one line without a traceback, and return 2.
    Ctrl-C returns 130, a bug 1 with its traceback. A crash, such as SIGSEGV, writes the stacks of all threads to
    stderr, and the command ends with its launcher.
    """
    _silence()
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
    """Exit the process.

    One of several ranks exits without the interpreter's cleanup, which occasionally aborts while threads of the
    collective library wait for ranks that have left. Everything is written and closed by then.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _reports() -> bool:
    """Whether this process reports what happens to all ranks: rank 0, and one on each further node."""
    return os.environ.get("RANK", "0") == "0" or os.environ.get("LOCAL_RANK") == "0"


def _silence() -> None:
    """Silence warnings about how libraries use each other, on which no user of a command can act."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.|deepspeed\.|transformers\.")
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # which peft imports where it is installed
