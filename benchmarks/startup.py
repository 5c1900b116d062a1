"""Seconds from the command to the first step.

    python -m benchmarks.startup [--layers 30]

Starts `launchers/train.py` on LLM-SRec as a person would, twice, and kills it after its first step. The first start may
find files out of the page cache, the second does not. The step itself is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.machine import RESULTS, describe, write
from benchmarks.setting import PRESET, add_arguments, overrides

TRAIN = Path(__file__).parents[1] / "launchers" / "train.py"


def main() -> None:
    """Measure, print, write."""
    options = _parse()
    seconds = [_start(options) for _ in range(2)]
    result = {
        "machine": describe(),
        "llm": str(options.llm),
        "layers": options.layers,
        "seconds_first_start": round(seconds[0], 1),
        "seconds_second_start": round(seconds[1], 1),
    }
    write(options.out, result)
    print(json.dumps(result, indent=1))


def _start(options: argparse.Namespace) -> float:
    """Seconds until the first step begins.

    Raises:
        RuntimeError: training ended before.
    """
    users = 4
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [
            sys.executable, str(TRAIN), str(PRESET), f"output={run}", f"train.batch_size={users}", "train.log_every=1",
            *overrides(options),
        ]  # fmt: skip
        environment = os.environ | {"DS_ACCELERATOR": "cpu"}
        began = time.time()
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as job:
            while not (line := _first_line(run / "metrics.jsonl")):
                if job.poll() is not None:
                    assert job.stderr is not None
                    raise RuntimeError(job.stderr.read().strip())
                time.sleep(0.05)
            job.kill()
        step = json.loads(line)
        step_seconds: float = users / step["speed/users_per_second"]
        return float(step["time"]) - step_seconds - began


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
