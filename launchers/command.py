"""What the commands share: errors as one line, and running a trained model."""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from shards.manifest import check_sizes, read_manifest
from trainer.config import RunConfig
from trainer.runs.folder import Checkpoint, CheckpointError, RunFolder


def run_command(command: Callable[[Sequence[str]], None]) -> int:
    """Exit code of a command: 0, or 2 after an error that its user can mend, told in one line, without a traceback."""
    _silence()
    try:
        command(sys.argv[1:])
    except (ValueError, OSError) as error:
        if os.environ.get("TRACEBACK"):  # for those who look for a bug
            raise
        # Ranks meet the same error; one of them tells it.
        if os.environ.get("RANK", "0") == "0" or os.environ.get("LOCAL_RANK") == "0":
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; start the same command again to go on from the last checkpoint", file=sys.stderr)
        return 130
    except Exception:  # noqa: BLE001 - a bug; told here because `leave` ends one of several ranks at once
        traceback.print_exc()
        return 1
    return 0


def leave(code: int) -> NoReturn:
    """End the process.

    One of several ranks ends at once: everything is written and closed by now, and while threads of the collective
    library wait for ranks that have left, the interpreter's orderly end now and then aborts.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


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


def checked_run(path: Path) -> tuple[RunConfig, Checkpoint]:
    """Configuration and best checkpoint of a run that can be used, as far as that shows without torch.

    Raises:
        ValueError: no run folder, no validation yet, a damaged checkpoint, or another dataset than it was trained on.
    """
    run = RunFolder(path)
    # The folder may have been moved since.
    config = run.config().model_copy(update={"output": path})
    checkpoint = run.best()
    manifest = read_manifest(config.data.path)
    if manifest.fingerprint != checkpoint.identity.dataset_fingerprint:
        raise CheckpointError(
            f"{path} was trained on another dataset than {config.data.path} holds now: build that one again"
        )
    check_sizes(config.data.path, manifest)
    return config, checkpoint


def _silence() -> None:
    """Warnings that are about libraries' use of each other: nobody who runs a command can act on them."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.|deepspeed\.|transformers\.")
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # about 4-bit kernels, which nothing here uses
