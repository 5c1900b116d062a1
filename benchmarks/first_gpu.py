"""Check on one GPU, in at most eight minutes, what tests without a GPU cannot.

    benchmarks/first_gpu.sh [--folder FOLDER]

Nothing is downloaded: the dataset is synthetic and the language models have random weights, at the shapes of 3B and 8B
models. `--folder` needs about 25 GB for them. Every check runs in a process of its own with a time limit, so that a
check that fails, crashes or hangs costs only its row; a check that the time left does not suffice for is skipped.

`--tiny` runs every check with tiny shapes, on a CPU too.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch

from benchmarks.common import gpu_checks
from benchmarks.common.gpu_checks import Found, Inputs
from benchmarks.common.machine import RESULTS, describe, write
from benchmarks.common.setting import synthetic_dataset

ROOT = Path(__file__).parents[1]
_SPARE = 10.0
"""Seconds kept of the whole budget, for killing a check and writing the results."""


@dataclass(frozen=True)
class Check:
    """One row of the result."""

    name: str
    run: Callable[[Inputs], Found]
    least: float
    """Seconds below which it is not started."""
    limit: float
    """Seconds after which it is killed."""


CHECKS = (
    Check("training command", gpu_checks.check_train_command, 20, 80),
    Check("attention kernel", gpu_checks.check_attention, 15, 60),
    Check("3B bf16", gpu_checks.check_speed("Llama-3.2-3B", "none"), 40, 100),
    Check("same steps twice", gpu_checks.check_repeat, 30, 60),
    Check("twice, deterministic", gpu_checks.check_deterministic_repeat, 30, 60),
    Check("published procedure", gpu_checks.check_published, 40, 110),
    Check("validation", gpu_checks.check_validation, 30, 70),
    Check("8B bf16", gpu_checks.check_speed("Llama-3.1-8B", "none"), 60, 120),
    Check("3B int8", gpu_checks.check_speed("Llama-3.2-3B", "int8"), 40, 100),
    Check("8B int8", gpu_checks.check_speed("Llama-3.1-8B", "int8"), 50, 120),
)
"""In the order of their worth: the time may not suffice for the last ones."""

Runner = Callable[[Check, float], Found]
"""Runs a check within a number of seconds; raises what the check raises, or TimeoutError."""


def main() -> None:
    """Check, print, write."""
    options = _parse()
    if options.only:
        _run_one(options)
    else:
        _run_all(options)


def _run_all(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="first-gpu-") as name:
        began = time.monotonic()
        inputs = _inputs(options, Path(name))
        runner: Runner = ChecksApart(inputs).run
        if options.one_process:
            runner = _here(inputs)
        rows = run_all(CHECKS, runner, until=began + options.seconds - _SPARE)
    result = {"machine": machine(), "tiny": options.tiny, "seconds": round(time.monotonic() - began, 1), "checks": rows}
    write(options.out, result)
    print(f"\n{table(rows)}\n\n{result['machine']}\n{result['seconds']:.0f} s; written to {options.out}")


def run_all(checks: Sequence[Check], run: Runner, until: float) -> dict[str, Found]:
    """Run the checks in turn; whatever happens in one, the others still run.

    Args:
        until: monotonic time at which all must have ended.

    Returns:
        A row per check, with its `state`: `ok`, `off` (not as it should be), `failed` (an exception) or `skipped`.
    """
    rows: dict[str, Found] = {}
    for check in checks:
        began = time.monotonic()
        left = until - began
        if left < check.least:
            row: Found = {"state": "skipped", "found": f"{max(left, 0):.0f} s were left, it takes {check.least:.0f} s"}
        else:
            row = _row(check, run, min(left, check.limit))
        rows[check.name] = row | {"seconds": round(time.monotonic() - began, 1)}
        print(f"{check.name}: {row['state']}: {row['found']}", flush=True)
    return rows


def _row(check: Check, run: Runner, seconds: float) -> Found:
    try:
        found = dict(run(check, seconds))
        return {"state": "ok" if found.pop("ok") else "off", **found}
    except TimeoutError:
        return {"state": "failed", "found": f"killed after {seconds:.0f} s"}
    except Exception as error:  # noqa: BLE001 - a check may raise anything, and the others must run
        reason = (str(error).strip() or "no message").splitlines()[0]
        return {
            "state": "failed",
            "found": f"{type(error).__name__}: {reason}",
            "trace": traceback.format_exc()[-3000:],
        }


class CheckError(RuntimeError):
    """A check's process ended without a result; the message is the end of what it said."""


@dataclass(frozen=True)
class ChecksApart:
    """Runs each check in a process of its own, whose device memory is free when it ends."""

    inputs: Inputs

    def run(self, check: Check, seconds: float) -> Found:
        """Run a check.

        Raises:
            CheckError: the check raised, or its process crashed.
            TimeoutError: it took longer than `seconds`, and was killed.
        """
        inputs, out = self.inputs, self.inputs.folder / "check.json"
        out.unlink(missing_ok=True)
        command = [
            sys.executable, "-m", "benchmarks.first_gpu", "--only", check.name, "--out", str(out),
            "--folder", str(inputs.folder), "--data", str(inputs.data), "--teacher", str(inputs.teacher),
            "--users", str(inputs.users), *(["--tiny"] if inputs.tiny else []),
        ]  # fmt: skip
        with (inputs.folder / "check.log").open("w+") as log:
            code = _run_within(command, seconds, log)
            if not out.is_file():
                log.seek(0)
                lines = log.read().strip().splitlines()
                ended = f"exit code {code}"
                raise CheckError("\n".join([lines[-1] if lines else ended, ended, *lines[-30:]]))
        found: Found = json.loads(out.read_text())
        return found


def _run_within(command: Sequence[str], seconds: float, log: IO[str]) -> int:
    """Run a command and return its exit code.

    Raises:
        TimeoutError: it took longer than `seconds`; it and all that it started were killed.
    """
    process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        raise TimeoutError from None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _here(inputs: Inputs) -> Runner:
    """Run checks in this process: they start at once, and nothing limits their time."""
    return lambda check, seconds: check.run(inputs)


def machine() -> str:
    """GPU with its memory and driver, versions, and processor, in one line."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        gpus = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        gpus = ""
    name = gpus.replace("\n", " + ") or "no GPU"
    return f"{name} (name, memory, driver), CUDA of torch {torch.version.cuda}, {platform.system()}, {describe()}"


def table(rows: Mapping[str, Found]) -> str:
    """The rows as text."""
    lines = [f"{name:22}{row['state']:9}{row['seconds']:6.0f} s  {row['found']}" for name, row in rows.items()]
    return "\n".join([f"{'check':22}{'state':9}{'took':>8}  found", *lines])


def _inputs(options: argparse.Namespace, folder: Path) -> Inputs:
    """The dataset and teacher of the options; a synthetic one, in `folder`, for each that is not given."""
    data = options.data or write_dataset(folder, tiny=options.tiny)
    return Inputs(folder, data.resolve(), options.teacher or folder / "sasrec", options.tiny, options.users)


def write_dataset(folder: Path, *, tiny: bool = False) -> Path:
    """The synthetic dataset of the checks, in `folder`."""
    users, items, more_words = (200, 120, 4) if tiny else (3000, 2000, 40)
    words = "--min-item 1 --min-train 3 --shards 4"
    return synthetic_dataset(folder, users=users, items=items, words=words, more_words=more_words)


def _run_one(options: argparse.Namespace) -> None:
    """Run the check `--only`, and write what it found."""
    check = next(check for check in CHECKS if check.name == options.only)
    inputs = Inputs(options.folder, options.data, options.teacher, options.tiny, options.users)
    write(options.out, check.run(inputs))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.first_gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, for a CPU")
    parser.add_argument("--seconds", type=float, default=480, help="for all checks together")
    parser.add_argument("--users", type=int, default=20, help="users per step")
    parser.add_argument("--folder", type=Path, help="where to write (default: the system's temporary folder)")
    parser.add_argument("--data", type=Path, help="dataset folder (default: a synthetic dataset)")
    parser.add_argument("--teacher", type=Path, help="run folder of a SASRec on it (default: a short run)")
    parser.add_argument("--one-process", action="store_true", help="faster to start, but a crash ends all")
    parser.add_argument("--only", choices=[check.name for check in CHECKS], help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS / "first_gpu.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
