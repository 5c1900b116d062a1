"""Checks of a run that went through faults."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from trainer.reports.results import read
from trainer.runs.folder import RunFolder

TIMES = {"started", "useful_seconds"}


def newest_step(run: Path) -> int:
    """Step of the newest intact checkpoint."""
    checkpoint = RunFolder(run).newest()
    return checkpoint.progress.step if checkpoint else 0


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
