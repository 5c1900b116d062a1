"""Measure the seconds from the command to the first step, by hand and through Slurm, in turns.

    python -m benchmarks.cluster.slurm_start [--rounds 3] [--layers 30]

By hand as in `startup.py`. Through Slurm: `launchers/slurm/submit.py` to a real cluster of one node on this machine
(`tests/slurm/local_cluster.py`; needs root), CPU settings, one rank. The clock starts with submit.py, so that the
preflight on the login node and the copy of the code count; the time until the job is queued is reported too.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common.machine import RESULTS, describe, write
from benchmarks.common.setting import add_arguments
from benchmarks.startup import first_step, plain_start, run_words

ROOT = Path(__file__).parents[2]


def main() -> None:
    """Measure, print, write."""
    options = _parse()
    sys.path.insert(0, str(ROOT / "tests" / "slurm"))
    slurm = importlib.import_module("local_cluster")
    if reason := slurm.install():
        raise SystemExit(f"error: {reason}")
    rounds = []
    with tempfile.TemporaryDirectory() as folder, slurm.local_cluster(Path(folder) / "cluster", nodes=1) as cluster:
        for number in range(options.rounds):
            plain = plain_start(options)
            submitted, first = _slurm_start(options, Path(folder) / f"run{number}", cluster)
            rounds.append({"plain": plain, "slurm": first, "slurm_of_which_submit": submitted})
    rows = [{name: round(seconds, 1) for name, seconds in row.items()} for row in rounds]
    result = {
        "machine": describe(),
        "state": options.state,
        "llm": str(options.llm),
        "layers": options.layers,
        "seconds": rows,
        "median_seconds_more_through_slurm": round(median(row["slurm"] - row["plain"] for row in rounds), 1),
    }
    write(options.out, result)
    print(json.dumps(result, indent=1))


def _slurm_start(options: argparse.Namespace, run: Path, cluster: Any) -> tuple[float, float]:
    """Seconds until the job is queued, and until its first step begins.

    Raises:
        RuntimeError: the job ended before its first step.
    """
    began = time.time()
    size = ["--cpu", "--nodes=1", "--per-node=1", "--cpus-per-task=1", "--time=10"]
    command = [sys.executable, str(ROOT / "launchers/slurm/submit.py"), "a6000", *run_words(options, run), *size]
    done = subprocess.run(command, env=cluster.environment, capture_output=True, text=True, check=True)
    submitted = time.time() - began
    found = re.match(r"job (\d+): ", done.stdout)
    assert found is not None, done.stdout
    job = found[1]

    def failed() -> str | None:
        if cluster.state(job) in {"PENDING", "CONFIGURING", "RUNNING"}:
            return None
        return "".join(path.read_text() for path in run.glob("slurm/*/*.out"))

    first = first_step(run, failed) - began
    cluster.run("scancel", job)
    cluster.wait_end(job)
    return submitted, first


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.cluster.slurm_start", description=__doc__.split("\n")[0])
    add_arguments(parser)
    parser.add_argument("--rounds", type=int, default=3, help="starts of each kind")
    parser.add_argument(
        "--state", default="not shared with other work", help="state of the machine, recorded in the result"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "slurm_start.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
