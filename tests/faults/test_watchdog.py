"""A rank that stops, hangs, dies or crashes: the other ranks exit in time and report which rank, and where."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from fault_checks import children, wait_for
from fault_rank import Fault, Preset, start_ranks

TIMEOUT = 4
LATER = 10
"""A step by which each watchdog has told its guard that the first one, which may take longer, is over."""


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_rank_is_reported_by_the_others(tmp_path: Path, preset: Preset, rank: int) -> None:
    """Including rank 0, which hosts the store of the process group."""
    words = [str(preset(tmp_path / "run", validate_every=2)), f"engine.timeout={TIMEOUT}"]
    ranks = start_ranks(tmp_path / "ranks", words, [Fault(rank, LATER, "step", "SIGSTOP")])
    other, codes = 1 - rank, ranks.wait()
    assert codes[other] == 3, ranks.all_said
    assert f"error: rank {rank}" in ranks.said(other)
    assert "is not responding" in ranks.said(other)
    assert f"rank {other} waits for it in step {LATER} (forward)" in ranks.said(other)
    stacks = (tmp_path / "run" / f"stacks-rank-{other}.txt").read_text()
    assert "in all_gather_rows" in stacks
    assert "watchdog" in stacks
    assert codes[rank] == -signal.SIGABRT, "its guard has ended it"
    assert f"error: rank {rank} was stopped, as by SIGSTOP, for" in ranks.said(rank)
    # Where it was stopped, or a little later: it has to run again to write its stacks.
    assert "most recent call first" in (tmp_path / "run" / f"stacks-rank-{rank}.txt").read_text()


def test_a_rank_that_hangs_is_reported_and_all_exit(tmp_path: Path, preset: Preset) -> None:
    words = [str(preset(tmp_path / "run")), f"engine.timeout={TIMEOUT}"]
    ranks = start_ranks(tmp_path / "ranks", words, [Fault(1, 5, "data", "sleep 1000")])
    assert ranks.wait() == [3, 3], ranks.all_said
    assert "error: rank 1 has been stuck in step 5 (data) for" in ranks.said(0)
    assert "in act" in (tmp_path / "run/stacks-rank-1.txt").read_text()
    assert "in all_gather_rows" in (tmp_path / "run/stacks-rank-0.txt").read_text()


def test_a_file_system_that_hangs_keeps_no_rank_alive(tmp_path: Path, preset: Preset) -> None:
    """Nor the guard of a rank that holds the interpreter lock: neither can write its stacks there."""
    words = [str(preset(tmp_path / "run", validate_every=2)), "engine.timeout=2"]
    files = [tmp_path / "run" / f"stacks-rank-{rank}.txt" for rank in (0, 1)]
    faults = [Fault(rank, LATER, "data", f"hang {files[rank]}") for rank in (0, 1)]
    ranks = start_ranks(tmp_path / "ranks", words, [*faults, Fault(1, LATER, "data", "hold 1000")])
    assert ranks.wait() == [3, -signal.SIGABRT], ranks.all_said
    assert "error: rank 1 is not responding, last seen in step" in ranks.said(0)
    assert "error: rank 1 is stuck: nothing else could run in its interpreter" in ranks.said(1)


def test_a_single_rank_that_hangs_is_reported(tmp_path: Path, preset: Preset) -> None:
    words = [str(preset(tmp_path / "run")), f"engine.timeout={TIMEOUT}"]
    ranks = start_ranks(tmp_path / "ranks", words, [Fault(0, 5, "data", "sleep 1000")], ranks=1)
    assert ranks.wait() == [3], ranks.all_said
    assert "error: no progress for 4 s in step 5 (data); stacks are in " in ranks.said(0)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_holds_the_interpreter_lock_ends_and_says_where(tmp_path: Path, preset: Preset, rank: int) -> None:
    """No thread of that rank can run any more, its watchdog and signal handlers included."""
    words = [str(preset(tmp_path / "run", validate_every=2)), f"engine.timeout={TIMEOUT}"]
    ranks = start_ranks(tmp_path / "ranks", words, [Fault(rank, LATER, "data", "hold 1000")])
    codes = ranks.wait()
    assert codes[rank] == -signal.SIGABRT, ranks.all_said
    assert codes[1 - rank] == 3
    assert f"error: rank {rank}" in ranks.said(1 - rank)
    assert "is not responding" in ranks.said(1 - rank)
    stacks = tmp_path / "run" / f"stacks-rank-{rank}.txt"
    assert f"error: rank {rank} is stuck: nothing else could run in its interpreter for" in ranks.said(rank)
    assert f"its stacks are in {stacks}" in ranks.said(rank)
    assert "in act" in stacks.read_text()


def test_a_segmentation_fault_leaves_the_stacks_of_its_rank(tmp_path: Path, preset: Preset) -> None:
    words = [str(preset(tmp_path / "run")), f"engine.timeout={TIMEOUT}"]
    ranks = start_ranks(tmp_path / "ranks", words, [Fault(1, 5, "data", "SIGSEGV")])
    codes = ranks.wait(60)
    assert codes == [3, -signal.SIGSEGV], ranks.all_said
    assert "error: rank 1 is not responding, last seen in step" in ranks.said(0)
    stacks = (tmp_path / "run/stacks-rank-1.txt").read_text()
    assert "Segmentation fault" in stacks
    assert "in act" in stacks


def test_a_run_that_was_suspended_goes_on(tmp_path: Path, preset: Preset) -> None:
    """As by `scontrol suspend`, which stops all processes of the job for longer than the watchdog waits."""
    words = [str(preset(tmp_path / "run")), "engine.timeout=1", "train.max_steps=3"]
    ranks = start_ranks(tmp_path / "ranks", words, [Fault(0, 3, "data", "sleep 0.7")], ranks=1)
    wait_for(ranks, "step 2/3")
    process = ranks.processes[0].pid
    assert process
    suspended = [process, *children(process)]
    assert len(suspended) == 2, "the rank and its guard"
    for number in suspended:
        os.kill(number, signal.SIGSTOP)
    time.sleep(8)  # the guard waits 1 + 5 s
    for number in suspended:
        os.kill(number, signal.SIGCONT)
    assert ranks.wait(60) == [0], ranks.all_said
    assert not list((tmp_path / "run").glob("stacks-*"))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_crash_ends_all_ranks_with_its_reason(tmp_path: Path, preset: Preset, rank: int) -> None:
    words = [str(preset(tmp_path / "run"))]
    ranks = start_ranks(tmp_path / "ranks", words, [Fault(rank, 5, "step", "raise out of luck")])
    codes = ranks.wait()
    assert codes[rank] == 1, ranks.all_said
    assert codes[1 - rank] == 3
    assert "RuntimeError: out of luck" in ranks.said(rank)
    assert f"error: rank {rank} failed in step 5 (data): RuntimeError: out of luck" in ranks.said(1 - rank)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_all_ranks(tmp_path: Path, preset: Preset, rank: int) -> None:
    words = [str(preset(tmp_path / "run")), "engine.timeout=10"]
    ranks = start_ranks(tmp_path / "ranks", words, [Fault(rank, 5, "step", "SIGKILL")])
    codes = ranks.wait()
    assert codes[rank] == -9
    assert codes[1 - rank] == 3, ranks.all_said
    assert f"error: rank {rank}" in ranks.said(1 - rank)
    assert "is not responding" in ranks.said(1 - rank)


def test_a_straggler_is_reported_within_fifty_steps(tmp_path: Path, preset: Preset) -> None:
    words = [str(preset(tmp_path / "run", max_steps=45, epochs=9, validate_every=9))]
    ranks = start_ranks(tmp_path / "ranks", words, [Fault(1, 2, "data", "sleep 0.1", every=True)])
    assert ranks.wait() == [0, 0], ranks.all_said
    assert "rank 1 is a straggler: its data loading and forward pass take" in ranks.said(0)
    assert ranks.said(0).count("is a straggler") == 1
