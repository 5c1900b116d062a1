"""A run that is asked to stop saves, exits, and resumes to the same end."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from fault_checks import assert_same_end, newest_step
from fault_rank import Fault, Preset, start_ranks

from benchmarks.common.ranks import Ranks
from trainer.engine.preemption import StopSignals
from trainer.reports.results import read
from trainer.runs.folder import RunFolder


def test_stopped_twice_and_started_again_ends_the_same(tmp_path: Path, preset: Preset, undisturbed: Path) -> None:
    run = tmp_path / "run"
    words = [str(preset(run))]

    # Only one rank is signalled at first, then both while they save.
    first = [Fault(1, 5, "data", "SIGUSR1"), Fault(0, 5, "sync 2", "SIGUSR1"), Fault(1, 5, "sync 1", "SIGTERM")]
    ranks = start_ranks(tmp_path / "first", words, first)
    assert ranks.wait() == [0, 0], ranks.all_said
    assert (run / "requeue").read_bytes() == b""
    assert newest_step(run) == 5
    assert "stopped by SIGUSR1 on rank 1 after step 5" in ranks.said(0)
    assert "stopped by SIGUSR1 on rank 1 after step 5" in (run / "log.txt").read_text()
    assert not (run / "results.jsonl").exists()

    # At a step with a validation: saved before it, validated when it resumes.
    ranks = start_ranks(tmp_path / "second", words, [Fault(0, 7, "data", "SIGTERM")])
    assert ranks.wait() == [0, 0], ranks.all_said
    assert (run / "requeue").exists()
    assert newest_step(run) == 7
    assert "resuming from step 5" in ranks.said(0)
    assert "stopped by SIGTERM on rank 0 after step 7" in ranks.said(0)

    ranks = start_ranks(tmp_path / "third", words)
    assert ranks.wait() == [0, 0], ranks.all_said
    assert not (run / "requeue").exists()
    assert_same_end(run, undisturbed)


def test_a_signal_before_the_first_step(tmp_path: Path, preset: Preset) -> None:
    """The signal arrives while the run still loads; the first step is run and saved."""
    run = tmp_path / "run"
    ranks = start_ranks(tmp_path / "ranks", [str(preset(run))], [Fault(1, 1, "data", "SIGTERM")])
    assert ranks.wait() == [0, 0], ranks.all_said
    assert (run / "requeue").exists()
    assert newest_step(run) == 1


@pytest.mark.parametrize("words", [[], ["resume=never"]], ids=["auto", "never"])
def test_ctrl_c_saves_and_says_how_to_resume(tmp_path: Path, preset: Preset, words: list[str]) -> None:
    start = [str(preset(tmp_path / "run")), *words]
    ranks = start_ranks(tmp_path / "ranks", start, [Fault(1, 3, "data", "SIGINT")], ranks=2)
    assert ranks.wait() == [130, 130], ranks.all_said
    command = "the same command with resume=auto" if words else "the same command"
    assert f"interrupted; {command} resumes from the checkpoint of step 3" in ranks.said(0).splitlines()
    assert not (tmp_path / "run" / "requeue").exists()
    resumed = start_ranks(tmp_path / "resumed", [*start, "resume=auto"], ranks=1)
    assert resumed.wait() == [0], resumed.all_said
    assert "resuming from step 3" in resumed.said(0)


def test_a_second_ctrl_c_stops_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two within a second are one: ranks get it from the terminal and from their launcher."""
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    signals = StopSignals()
    with signals.noting_interrupts():
        signal.raise_signal(signal.SIGINT)
        now += 0.9
        signal.raise_signal(signal.SIGINT)
        assert signals.number == signal.SIGINT
        now += 1.1
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_run_stopped_in_validation_and_test_ends_the_same(tmp_path: Path, preset: Preset, undisturbed: Path) -> None:
    """Each rank has five batches per validation and ten in the test; if one is signalled, both end with that batch."""
    run = tmp_path / "run"
    words = [str(preset(run))]

    def start(name: str, *faults: Fault) -> Ranks:
        ranks = start_ranks(tmp_path / name, words, list(faults))
        assert ranks.wait() == [0, 0], ranks.all_said
        return ranks

    ranks = start("first", Fault(1, 4, "valid 2", "SIGUSR1"))
    assert (run / "requeue").exists()
    assert newest_step(run) == 4
    assert "stopped by SIGUSR1 on rank 1 after step 4, during validation" in ranks.said(0)
    assert [ranks.said(rank).count("ranks valid") for rank in (0, 1)] == [2, 2]
    newest = RunFolder(run).newest()
    assert newest is not None
    assert not newest.progress.validations

    ranks = start("second", Fault(0, 0, "valid 3", "SIGTERM"))  # in the repeated validation, before any step
    assert "resuming from step 4" in ranks.said(0)
    assert [ranks.said(rank).count("ranks valid") for rank in (0, 1)] == [3, 3]
    assert newest_step(run) == 4

    ranks = start("third", Fault(1, 14, "test 7", "SIGUSR1"))  # the first of two results exists by then
    assert (run / "requeue").exists()
    assert "stopped by SIGUSR1 on rank 1 during the test" in ranks.said(0)
    assert [ranks.said(rank).count("ranks test") for rank in (0, 1)] == [7, 7]
    assert len(read(run / "results.jsonl")) == 1

    ranks = start("fourth")
    assert not (run / "requeue").exists()
    assert ranks.said(0).count("ranks test") == 5, "the result that was written is not repeated"
    assert_same_end(run, undisturbed)
