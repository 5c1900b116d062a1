"""A gradient or a weight that is not finite on one rank: every rank stops, before any parameter moves or is saved."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
from fault_checks import assert_same_end, newest_step
from fault_rank import Fault, Preset, start_ranks

from benchmarks.common import ranks as plain
from benchmarks.common.inject import Injection, Moment, plant


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


@pytest.mark.parametrize("zero", ["zero0", "zero1", "zero3"])
def test_weights_that_are_not_finite_are_not_saved(
    tmp_path: Path, preset: Preset, undisturbed: Path, zero: str
) -> None:
    """Broken memory, after a step with a finite loss and gradient: the run could resume from no such checkpoint."""
    run = tmp_path / "run"
    words = [str(preset(run, save_every=3)), f"engine.deepspeed={zero}"]
    broken = Injection(1, Moment("save", 6), "nan", tmp_path / "done")
    ranks = plain.start_ranks(tmp_path / "ranks", words, prepare=partial(plant, broken))
    assert ranks.wait() == [2, 2], ranks.all_said
    assert "error: step 6: trained weights or Adam's moments on rank 1 are NaN or infinite" in ranks.said(0)
    assert newest_step(run) == 4
    if zero == "zero1":
        again = start_ranks(tmp_path / "again", words)
        assert again.wait() == [0, 0], again.all_said
        assert_same_end(run, undisturbed)
