"""A gradient that is not finite on one rank: every rank stops before any parameter moves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fault_checks import newest_step
from fault_rank import Fault, Preset, start_ranks


@pytest.mark.parametrize("words", [["zero0"], ["zero2", "train.micro_batch_size=3"], ["zero3"]], ids=" ".join)
def test_all_ranks_stop_before_the_step(tmp_path: Path, preset: Preset, words: list[str]) -> None:
    run = tmp_path / "run"
    start = [str(preset(run, save_every=1)), f"engine.deepspeed={words[0]}", *words[1:]]
    ranks = start_ranks(tmp_path / "ranks", start, [Fault(1, 3, "loss", "nan")])
    assert ranks.wait() == [2, 2], ranks.all_said
    assert "error: step 3: the gradient norm on rank 1 is nan; its users are in" in ranks.said(0)
    for rank in (0, 1):
        assert "parameters moved: False" in ranks.said(rank)
    report = json.loads((run / "nonfinite.json").read_text())
    assert report["step"] == 3
    assert len(set(report["users"])) == 10
    assert newest_step(run) == 2
