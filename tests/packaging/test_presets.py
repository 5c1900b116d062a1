"""Presets by name."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest
from helpers import ROOT

from launchers.compare import main as compare
from trainer.config import ConfigError, load_config
from trainer.config.presets import find_preset, preset_names

FILES = sorted(
    file
    for file in (ROOT / "trainer/presets").glob("**/*.yaml")
    if file.parent.name not in ("experiments", "recipes")  # of several runs: tests/workflows/experiments
)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Names must mean the same from any working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_name_means_one_file() -> None:
    names = Counter(word for file in FILES for word in (file.name, file.stem))
    assert {name: count for name, count in names.items() if count > 1} == {}
    assert sorted(preset_names()) == sorted(file.name for file in FILES)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_packaged_preset_is_found(file: Path) -> None:
    path = file.relative_to(ROOT)
    for written in (Path(file.stem), Path(file.name), path, path.with_suffix(""), file):
        assert find_preset(written) == file
    assert load_config(Path(file.stem)) == load_config(path) == load_config(file)


def test_an_existing_file_comes_first(elsewhere: Path) -> None:
    shutil.copy(ROOT / "trainer/presets/gru4rec.yaml", elsewhere / "sasrec.yaml")
    assert find_preset(Path("sasrec.yaml")) == Path("sasrec.yaml")
    assert load_config(Path("sasrec.yaml")).system.name == "gru4rec"
    (elsewhere / "sasrec").mkdir()  # a run folder, say
    assert load_config(Path("sasrec")).system.name == "sasrec"


@pytest.mark.parametrize("word", ["mine/sasrec.yaml", "presets/sasrec.yaml", "/nowhere/sasrec.yaml", "sasrc"])
def test_another_path_stays_an_error(word: str) -> None:
    assert find_preset(Path(word)) == Path(word)
    with pytest.raises(ConfigError, match=f"no such file: {word} .*sasrec.yaml.*quickstart_sasrec.yaml"):
        load_config(Path(word))


def test_a_comparison_takes_names(capsys: pytest.CaptureFixture[str]) -> None:
    compare(["sasrec", "quickstart_sasrec.yaml", "quickstart_sasrec:train.epochs=3", "output=runs", "--dry-run"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1:3] for line in lines] == [
        ["sasrec", "runs/sasrec:"], ["quickstart_sasrec", "runs/quickstart_sasrec:"],
    ]  # fmt: skip
