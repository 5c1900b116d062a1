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
    assert any(line.startswith("NDCG@10: 0.") and "with shuffled histories (" in line for line in lines)
    assert sum(line.startswith("  ") and ". " in line for line in lines) >= 5
    assert lines[-1] == "item vectors: (40, 64)"
