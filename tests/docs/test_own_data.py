"""The ten lines of docs/start/own_data.md, run as they are written, on a shop's csv files."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
from doc_commands import blocks
from helpers import ROOT

pytestmark = pytest.mark.process

SMALL = "train.max_steps=4 train.batch_size=16 engine.threads=1"


def write_shop(folder: Path) -> None:
    """Orders of 60 customers, who go round a shelf of 40 articles."""
    with (folder / "items.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["sku", "name"], *([f"S{number}", f"Article {number}"] for number in range(40))])
    with (folder / "orders.csv").open("w", newline="") as file:
        rows = [
            [f"C{1000 + customer}", f"S{(customer + step) % 40}", 1_700_000_000 + 3600 * step]
            for customer in range(60)
            for step in range(12)
        ]
        csv.writer(file).writerows([["customer", "sku", "bought_at"], *rows])


def test_the_ten_lines_run(tmp_path: Path) -> None:
    write_shop(tmp_path)
    script = blocks((ROOT / "docs/start/own_data.md").read_text(), "sh")[0]
    assert script.count("\n") <= 10
    # A catalog of 40 items has no 99 negatives; and four steps are enough to see that the commands work.
    script = script.replace("--name shop", "--name shop --negatives 19 --title-negatives 5")
    script = script.replace("output=runs/shop/sasrec", f"output=runs/shop/sasrec {SMALL}")
    command = f'llm-srec() {{ "{sys.executable}" -m launchers.cli "$@"; }}\nset -e\n{script}'
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *_, recommended = done.stdout.split("user C1001, latest items:")
    assert "Article 12" in recommended.split("recommended:")[0]
    assert len(recommended.split("recommended:")[1].strip().splitlines()) == 10
