"""`launchers/title_store.py`, run as a command, and a run that reads its prefix cache."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import run_command
from launch_helpers import Refused, Trained

from launchers.title_store import main
from launchers.train import main as train_main

pytestmark = pytest.mark.process


def test_a_run_ranks_the_same_with_a_prefix_cache(
    srec: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, run = tmp_path / "titles", tmp_path / "run"
    words = [str(srec.preset), f"system.llm.title_store={store}"]
    done = run_command("launchers/title_store.py", *words)
    assert done.returncode == 0, done.stderr
    assert "tokens of 40 titles, 0.00 GB" in done.stdout
    main(words)
    assert "exists and is intact" in capsys.readouterr().out
    shutil.copytree(srec.output, run)
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["system"]["llm"]["title_store"] = str(store)
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    with_store, without = (_evaluated(folder) for folder in (run, srec.output))
    assert with_store["metrics"] == pytest.approx(without["metrics"], abs=1e-6)


def _evaluated(run: Path) -> dict[str, Any]:
    done = run_command("launchers/evaluate.py", run, "--users", "60", "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return {"metrics": {name: value["value"] for name, value in found["metrics"].items()}}


def test_what_is_refused(refused: Refused, preset: Path, tmp_path: Path) -> None:
    words = (preset, f"system.llm.title_store={tmp_path / 'titles'}")
    assert "add system.llm.title_store=FOLDER" in refused(main, preset)
    assert "0.00 GB, more than --limit-gb 1e-06: raise it" in refused(main, *words, "--limit-gb", "1e-6")
    error = refused(train_main, *words)
    assert "titles is not a prefix cache: compute it with `llm-srec title-store PRESET" in error
    assert not (tmp_path / "titles").exists()
    assert not (tmp_path / "run").exists()
