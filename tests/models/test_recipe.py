"""CONTRIBUTING.md's recipe for a new system, followed as it stands in a copy of the source tree."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import ROOT, sasrec_config, write_config

from trainer.reports.results import read

pytestmark = pytest.mark.process

SOURCES = ("trainer", "launchers", "shards", "ds_configs", "pyproject.toml")


REGISTRY = "trainer/models/__init__.py"


def recipe() -> dict[str, str]:
    """The files of the recipe: each fenced block, by the path named last before it; one is a part of `REGISTRY`."""
    text = (ROOT / "CONTRIBUTING.md").read_text().split("## Adding a system\n")[1].split("\n## ")[0]
    files = {}
    for block in re.finditer(r"```(?:python|yaml)\n(.*?)```", text, re.DOTALL):
        before = text[: block.start()]
        files[re.findall(r"`(trainer/[\w/]+\.(?:py|yaml))`", before)[-1]] = block[1]
    return files


def insert(path: Path, before: str, line: str) -> None:
    """Put a line in front of the first place where `before` stands."""
    text = path.read_text()
    assert before in text, f"{path} has changed: {before}"
    path.write_text(text.replace(before, line + before, 1))


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tree")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, root / name)
    files = recipe()
    assert sorted(files) == [
        "trainer/config/item_mean.py", REGISTRY, "trainer/models/by_id/item_mean.py", "trainer/presets/item_mean.yaml",
    ]  # fmt: skip
    case = files.pop(REGISTRY)
    for name, text in files.items():
        assert not (root / name).exists()
        (root / name).write_text(text)
    # Step 3.
    schema, registry = root / "trainer/config/schema.py", root / REGISTRY
    insert(schema, "from trainer.config.llm_systems", "from trainer.config.item_mean import ItemMeanConfig\n")
    insert(schema, "    | GRU4RecConfig\n", "    | ItemMeanConfig\n")
    insert(registry, "from trainer.config.text_systems", "from trainer.config.item_mean import ItemMeanConfig\n")
    insert(registry, "        case unknown:\n", case)
    return root


@pytest.fixture(scope="module")
def run(tree: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    def call(*words: str | Path) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(tree), "DS_ACCELERATOR": "cpu"}
        command = [sys.executable, *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tree, check=False)

    return call


def test_the_new_system_trains_and_is_compared(
    run: Callable[..., subprocess.CompletedProcess[str]], tree: Path, world: Path, tmp_path: Path
) -> None:
    sasrec = write_config(tmp_path / "sasrec.yaml", sasrec_config(world, tmp_path / "sasrec"))
    words = [
        f"data.path={world}",
        "train.epochs=30",
        "train.lr=0.01",
        "engine.threads=1",
        f"output={tmp_path / 'runs'}",
    ]
    done = run("launchers/compare.py", "trainer/presets/item_mean.yaml", sasrec, *words)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^item_mean +61 ", done.stdout, re.MULTILINE), done.stdout

    original, shuffled = read(tmp_path / "runs" / "item_mean" / "results.jsonl")
    assert (original.system, original.history, shuffled.history) == ("item_mean", "original", "shuffled")
    assert original.metrics["NDCG@10"].value > 0.3, "chance is 0.23"
    # A bag has no order. (Sums in another order differ in their last bit, which could move a rank.)
    assert shuffled.metrics["NDCG@10"].value == pytest.approx(original.metrics["NDCG@10"].value, abs=0.01)

    asked = run("launchers/recommend.py", tmp_path / "runs" / "item_mean", "--user", "1", "--top", "3")
    assert asked.returncode == 0 or "lists the users" in asked.stderr, asked.stderr
    wrong = run("launchers/train.py", "trainer/presets/item_mean.yaml", "system.dimm=3")
    assert "did you mean 'dim'?" in wrong.stderr


def test_the_recipe_is_written_as_the_house_writes(run: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    changed = [*(name for name in recipe() if name.endswith(".py")), "trainer/config/schema.py"]
    for check in (["check"], ["format", "--check"]):
        done = run("-m", "ruff", *check, *changed)
        assert done.returncode == 0, done.stdout + done.stderr
