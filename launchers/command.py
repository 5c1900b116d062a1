"""What the commands share: errors as one line, and running a trained model."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path


def run_command(command: Callable[[Sequence[str]], None]) -> int:
    """Exit code of a command: 0, or 2 after an error that its user can mend, told in one line, without a traceback."""
    try:
        command(sys.argv[1:])
    except (ValueError, OSError) as error:
        # Ranks meet the same error; one of them tells it.
        if os.environ.get("RANK", "0") == "0" or os.environ.get("LOCAL_RANK") == "0":
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; start the same command again to go on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def checked_folder(text: str) -> Path:
    """A run folder given on the command line."""
    path = Path(text)
    if not (path / "config.yaml").is_file():
        raise ValueError(f"{path} is no run folder (no config.yaml in it): train first, or fix the path")
    return path
