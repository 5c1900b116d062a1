"""A run that resumes at different numbers of ranks and different ZeRO stages than it was stopped at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fault_checks import newest_step
from fault_rank import Fault, Preset, start_ranks
from safetensors.numpy import load_file

from trainer.runs.folder import RunFolder

STEPS = 14
HPZ = {"stage": 3, "zero_hpz_partition_size": 2}
"""ZeRO-3 with a copy of all weights per pair of ranks, as on nodes of two."""


def losses(run: Path) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["train/loss"] for line in lines if "train/loss" in line]


@pytest.mark.parametrize("stages", [(1, 1, 1, 1), (2, 3, 0, HPZ)], ids=["zero1", "changing stages"])
def test_four_ranks_then_two_one_and_four(
    tmp_path: Path, preset: Preset, undisturbed: Path, stages: tuple[Any, ...]
) -> None:
    """Batches of ten users on four ranks: uneven shares, and three ranks without a user in the last batch."""
    run = tmp_path / "run"
    for stage, ranks, end in zip(stages, (4, 2, 1, 4), (4, 7, 10, STEPS), strict=True):
        file = f"zero{stage}"
        if isinstance(stage, dict):
            (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": stage}))
            file = str(tmp_path / "ds.json")
        words = [str(preset(run)), f"engine.deepspeed={file}"]
        faults = [Fault(0, end, "data", "SIGTERM")] if end < STEPS else []
        started = start_ranks(tmp_path / f"ranks{end}", words, faults, ranks=ranks)
        assert started.wait() == [0] * ranks, started.all_said
        assert newest_step(run) == end
    assert len(losses(run)) == STEPS
    np.testing.assert_allclose(losses(run), losses(undisturbed), rtol=0, atol=2e-5)
    for file in ("weights", "moments"):
        found, expected = (
            load_file(RunFolder(folder).step_path(STEPS) / f"{file}.safetensors") for folder in (run, undisturbed)
        )
        assert found.keys() == expected.keys()
        for name, value in found.items():
            # The bias of the keys shifts all scores alike: its gradient is rounding, which Adam turns into full steps.
            if not (file == "weights" and name.endswith("attention.key.bias")):
                np.testing.assert_allclose(value, expected[name], rtol=0, atol=2e-5, err_msg=f"{file} {name}")
