"""The examples run from top to bottom."""

from __future__ import annotations

from pathlib import Path

import pytest
from forked import run_forked
from helpers import ROOT


@pytest.mark.process
def test_train_and_query(world: Path, tmp_path: Path) -> None:
    script = ROOT / "examples" / "train_and_query.py"
    done = run_forked(script, [world, tmp_path / "run"], {"DS_ACCELERATOR": "cpu"})
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("sasrec, batches of ")
    assert f"<Run {tmp_path / 'run'}: sasrec, step " in done.stdout
    assert any(line.startswith("NDCG@10: 0.") and "with shuffled histories (" in line for line in lines)
    assert sum(line.startswith("  ") and "(id i" in line for line in lines) == 5
    assert any(line.startswith("after ") and line.count("No. ") == 6 for line in lines)
    assert any(line.startswith("refused: item ") and "did you mean" in line for line in lines)
    assert any(line.startswith("item vectors: (40, 64), the best item is ") for line in lines)
    assert lines[-1].startswith("retrained: NDCG@10 0.")


@pytest.mark.process
def test_the_journey(tmp_path: Path) -> None:
    """The whole way of a new user: csv, training, recommendations, export, server, new items."""
    pytest.importorskip("fastapi", reason="the extra serve is not installed")
    done = run_forked(ROOT / "examples" / "journey.py", [tmp_path], {"DS_ACCELERATOR": "cpu"})
    assert done.returncode == 0, done.stderr
    assert "after a hammer and a saw: Amber drill" in done.stdout
    assert "Amber drill" in next(line for line in done.stdout.splitlines() if line.startswith("http://127.0.0.1:"))
    assert "; ended with 0" in done.stdout, "SIGTERM ends the server as asked"
    assert "50 articles carried over, 2 new" in done.stdout
    assert "after a torch: " in done.stdout
