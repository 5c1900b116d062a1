"""The checks for a first GPU run on a CPU with tiny shapes, and a check that fails costs only its row."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import ROOT, run_command

from benchmarks.common import gpu_checks
from benchmarks.common.gpu_checks import TINY_LLM, Found, Inputs, compare_attention, memory_against_plan, random_stream
from benchmarks.first_gpu import CHECKS, Check, ChecksApart, run_all, table
from trainer.nn.llm import attention


@pytest.mark.process
def test_every_check_runs_with_tiny_shapes(world: Path, teacher: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    words: list[str | Path] = [
        "--tiny",
        "--one-process",
        "--users",
        "6",
        "--data",
        world,
        "--teacher",
        teacher,
        "--out",
        out,
    ]
    done = run_command("benchmarks/first_gpu.py", *words, "--folder", tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert "torch" in result["machine"]
    checks = result["checks"]
    assert list(checks) == [check.name for check in CHECKS]
    assert {row["state"] for row in checks.values()} == {"ok"}, done.stdout
    assert checks["3B bf16"]["useful_tokens_a_second"] > 0
    assert checks["3B bf16"]["planned_gib"] > 0
    assert checks["same steps twice"]["largest_difference"] == 0
    assert checks["published procedure"]["times_as_fast"] > 0
    assert not list(tmp_path.glob("first-gpu-*")), "the random models are gigabytes and must not stay"


def test_a_check_costs_only_its_row() -> None:
    def run(check: Check, seconds: float) -> Found:
        assert seconds <= check.limit
        return check.run(Inputs(Path(), Path(), Path()))

    def raises(inputs: Inputs) -> Found:
        raise ValueError("out of memory\nand more")

    def hangs(inputs: Inputs) -> Found:
        raise TimeoutError

    checks = [
        Check("raises", raises, 0, 5),
        Check("hangs", hangs, 0, 5),
        Check("wrong", lambda inputs: {"ok": False, "found": "1.3 of the plan"}, 0, 5),
        Check("long", raises, 1000, 2000),
        Check("right", lambda inputs: {"ok": True, "found": "equal"}, 0, 5),
    ]
    rows = run_all(checks, run, until=time.monotonic() + 60)
    assert [row["state"] for row in rows.values()] == ["failed", "failed", "off", "skipped", "ok"]
    assert rows["raises"]["found"] == "ValueError: out of memory"
    assert rows["hangs"]["found"] == "killed after 5 s"
    assert len(table(rows).splitlines()) == 1 + len(checks)


def test_a_check_of_its_own_process_is_killed_in_time(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        ChecksApart(Inputs(tmp_path, tmp_path, tmp_path, tiny=True)).run(CHECKS[1], 0.3)
    assert time.monotonic() - began < 10


def test_the_attention_check_sees_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "tests" / "nn")
    from nn_helpers import plain_varlen

    def found(align_last: bool) -> Found:
        monkeypatch.setattr(attention, "varlen_kernel", lambda query: partial(plain_varlen, align_last=align_last))
        return compare_attention(TINY_LLM, random_stream(40, 6), torch.device("cpu"))

    assert found(align_last=True)["ok"]
    assert not found(align_last=False)["ok"]


@pytest.mark.parametrize(("peak", "ok"), [(89, False), (91, True), (109, True), (111, False)])
def test_peak_memory_is_within_a_tenth_of_the_plan(monkeypatch: pytest.MonkeyPatch, peak: int, ok: bool) -> None:
    monkeypatch.setattr(gpu_checks, "peak_memory_bytes", lambda: peak << 20)
    assert memory_against_plan(torch.device("cuda"), 100 << 20)["ok"] is ok
