"""Measure the seconds from the command to the first step.

    python -m benchmarks.startup [--layers 30]

Starts `launchers/train.py` on LLM-SRec twice, from the command line, and kills it after its first step. The first start
may read files from disk, the second finds them in the page cache. The step itself is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.common.machine import RESULTS, describe, write
from benchmarks.common.setting import PRESET, add_arguments, overrides

TRAIN = Path(__file__).parents[1] / "launchers" / "train.py"
USERS = 4


def main() -> None:
    """Measure, print, write."""
    options = _parse()
    seconds = [plain_start(options) for _ in range(2)]
    result = {
        "machine": describe(),
        "llm": str(options.llm),
        "layers": options.layers,
        "seconds_first_start": round(seconds[0], 1),
        "seconds_second_start": round(seconds[1], 1),
    }
    write(options.out, result)
    print(json.dumps(result, indent=1))


def plain_start(options: argparse.Namespace) -> float:
    """Seconds until the first step of a run of one process begins.

    Raises:
        RuntimeError: training ended before its first step.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, str(TRAIN), *run_words(options, run)]
        began = time.time()
        environment = os.environ | {"DS_ACCELERATOR": "cpu"}
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as job:

            def failed() -> str | None:
                assert job.stderr is not None
                return job.stderr.read().strip() if job.poll() is not None else None

            first = first_step(run, failed)
            job.kill()
        return first - began


def run_words(options: argparse.Namespace, run: Path) -> list[str]:
    """Arguments of the run: the preset and its overrides."""
    return [str(PRESET), f"output={run}", f"train.batch_size={USERS}", "train.log_every=1", *overrides(options)]


def first_step(run: Path, failed: Callable[[], str | None]) -> float:
    """Wait until the first step has ended and return when it began, as `time.time()`.

    Args:
        failed: returns why the run ended before its first step, or None while it has not.

    Raises:
        RuntimeError: the run ended before its first step.
    """
    while not (line := _first_line(run / "metrics.jsonl")):
        if (reason := failed()) is not None:
            raise RuntimeError(reason)
        time.sleep(0.05)
    step = json.loads(line)
    return float(step["time"]) - USERS / float(step["speed/users_per_second"])


def _first_line(path: Path) -> str:
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return text.split("\n")[0] if "\n" in text else ""


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.startup", description=__doc__.split("\n")[0])
    add_arguments(parser)
    parser.add_argument("--out", type=Path, default=RESULTS / "startup.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
