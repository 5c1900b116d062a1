"""The examples run from top to bottom."""

from __future__ import annotations

import os
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

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
@pytest.mark.skipif(find_spec("ipykernel") is not None, reason="Jupyter is installed: the notebook of it runs instead")
def test_the_journey(tmp_path: Path) -> None:
    """The whole way of a new user: csv, training, recommendations, export, server, new items."""
    pytest.importorskip("fastapi", reason="the extra serve is not installed")
    done = run_forked(ROOT / "examples" / "journey.py", [tmp_path], {"DS_ACCELERATOR": "cpu"})
    assert done.returncode == 0, done.stderr
    _check_journey(done.stdout)


@pytest.mark.process
def test_the_journey_in_jupyter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The committed notebook, in a real kernel, which runs an event loop and has arguments of its own."""
    for package in ("fastapi", "ipykernel"):
        pytest.importorskip(package, reason="the extras serve and notebook are not installed")
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))
    notebook = nbformat.read(ROOT / "examples/journey.ipynb", nbformat.NO_CONVERT)
    client = nbclient.NotebookClient(notebook, kernel_name="python3", timeout=300)
    client.execute(cwd=str(tmp_path))  # raises the error of a cell
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    _check_journey("".join(output["text"] for output in outputs if output.get("name") == "stdout"))


def test_the_notebook_of_the_journey_is_its_script_without_outputs() -> None:
    jupytext = pytest.importorskip("jupytext", reason="the extra notebook is not installed")
    script, notebook = (jupytext.read(ROOT / f"examples/journey.{suffix}") for suffix in ("py", "ipynb"))

    def cells(of: Any) -> list[tuple[str, str]]:
        return [(cell.cell_type, cell.source) for cell in of.cells]

    update = "run: jupytext --update --to ipynb examples/journey.py"
    assert cells(notebook) == cells(script), update
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells), "clear its outputs"


def _check_journey(printed: str) -> None:
    assert "after a hammer and a saw: Amber drill" in printed
    # SIGTERM ends the server as asked.
    assert re.search(r"^http://127\.0\.0\.1:\d+: Amber drill.*; ended with 0$", printed, re.MULTILINE)
    assert "50 articles carried over, 2 new" in printed
    assert "after a torch: " in printed
