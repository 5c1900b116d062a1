"""Checks of a run that went through faults."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from benchmarks.common.ranks import Ranks
from trainer.reports.results import read
from trainer.runs.folder import RunFolder

TIMES = {"started", "useful_seconds"}


def newest_step(run: Path) -> int:
    """Step of the newest intact checkpoint."""
    checkpoint = RunFolder(run).newest()
    return checkpoint.progress.step if checkpoint else 0


def wait_for(ranks: Ranks, said: str, timeout: float = 60) -> None:
    """Wait until rank 0 has said something; assert that it does in time."""
    end, output = time.monotonic() + timeout, ranks.folder / "0.out"
    while not output.is_file() or said not in output.read_text():
        assert time.monotonic() < end, ranks.all_said
        time.sleep(0.05)


def children(process: int) -> list[int]:
    """Processes that this one started."""
    found = Path(f"/proc/{process}/task").glob("*/children")
    return [int(word) for file in found for word in file.read_text().split()]


def assert_same_end(run: Path, expected: Path) -> None:
    """Check that both ended with the same parameters, moments, progress, best step and results, bit for bit."""
    assert newest_step(run) == newest_step(expected)
    steps = [RunFolder(folder).step_path(newest_step(expected)) for folder in (run, expected)]
    for file in ("weights", "moments"):
        found, wanted = (load_file(step / f"{file}.safetensors") for step in steps)
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert np.array_equal(found[name], value), f"{file} {name}"
    found, wanted = (json.loads((step / "state.json").read_text()) for step in steps)
    assert {key: value for key, value in found["progress"].items() if key not in TIMES} == {
        key: value for key, value in wanted["progress"].items() if key not in TIMES
    }
    assert RunFolder(run).best().progress.step == RunFolder(expected).best().progress.step
    assert [r.metrics for r in read(run / "results.jsonl")] == [r.metrics for r in read(expected / "results.jsonl")]
