"""Test results of trained runs."""

from __future__ import annotations

from pathlib import Path

from trainer.reports.results import RESULTS_FILE, Result, latest, read


def test_results(run: Path) -> tuple[Result, Result] | None:
    """The newest test results of retrieval on original and shuffled histories; None if the run has not ended."""
    file = run / RESULTS_FILE
    tests = [r for r in latest(read(file)) if r.split == "test" and r.task == "retrieval"] if file.is_file() else []
    newest = {result.history: result for result in tests}
    return (newest["original"], newest["shuffled"]) if len(newest) == 2 else None
