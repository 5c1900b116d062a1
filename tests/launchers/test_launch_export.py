"""`export.py`: what an export holds, that it ranks as its run does, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from helpers import build_llm, llm_srec_config, train_run
from huggingface_hub import ModelCard
from launch_helpers import Main, Refused, contents
from safetensors import safe_open

import trainer
from launchers import export, recommend

pytestmark = pytest.mark.process

Shared = Callable[[str, Callable[[Path], object]], Path]

HISTORIES = [["i3", "i17", "i8"], ["Amber Brass No. 12"]]


@pytest.fixture(scope="session")
def exported(shared: Shared, teacher: Path) -> Path:
    """An export of the SASRec run."""
    return shared("exported", lambda folder: export.main([str(teacher), str(folder / "export")])) / "export"


@pytest.fixture(scope="session")
def movable(shared: Shared, world: Path, teacher: Path) -> Path:
    """A folder with an LLM-SRec run, its own copies of all that it builds on, and its export."""

    def build(folder: Path) -> None:
        shutil.copytree(world, folder / "dataset")
        shutil.copytree(teacher, folder / "teacher")
        build_llm(folder / "llm")
        train_run(llm_srec_config(folder / "dataset", folder / "run", folder / "teacher", folder / "llm", epochs=1))
        export.main([str(folder / "run"), str(folder / "export"), "--license", "apache-2.0"])

    return shared("movable", build)


def test_an_export_of_an_id_system_ranks_as_its_run(teacher: Path, exported: Path) -> None:
    run, copy = trainer.load_run(teacher), trainer.load_run(exported)
    assert copy.recommend(HISTORIES, k=40) == run.recommend(HISTORIES, k=40)
    assert copy.recommend(HISTORIES, candidates=["i5", "i6"]) == run.recommend(HISTORIES, candidates=["i5", "i6"])
    np.testing.assert_array_equal(copy.item_vectors().vectors, run.item_vectors().vectors)
    np.testing.assert_array_equal(copy.user_vectors(HISTORIES), run.user_vectors(HISTORIES))


def test_an_export_of_llm_srec_stands_alone(movable: Path, tmp_path: Path) -> None:
    """Without the run, its dataset, its teacher and its cached item vectors, and with the LLM elsewhere."""
    wanted = trainer.load_run(movable / "run").recommend(HISTORIES, k=40)
    shutil.copytree(movable / "export", tmp_path / "export")
    shutil.copytree(movable / "llm", tmp_path / "llm")
    os.rename(movable, movable.with_name("elsewhere"))
    try:
        with pytest.raises(ValueError, match=r"and .*/llm is not there: give its folder with --llm"):
            trainer.load_run(tmp_path / "export")
        copy = trainer.load_run(tmp_path / "export", llm=tmp_path / "llm")
        assert copy.recommend(HISTORIES, k=40) == wanted
    finally:
        os.rename(movable.with_name("elsewhere"), movable)


def test_another_llm_is_refused(movable: Path, tmp_path: Path, refused: Refused) -> None:
    llm = build_llm(tmp_path / "llm", layers=2)
    line = refused(recommend.main, movable / "export", "--history", "i3", "--llm", llm)
    assert "is not the language model or text encoder that" in line


def test_what_an_export_holds(movable: Path, exported: Path, world: Path) -> None:
    folder = movable / "export"
    catalog = pl.read_parquet(world / "catalog.parquet").sort("item")
    items = pl.read_parquet(folder / "items.parquet")
    assert items["item_id"].to_list() == catalog["raw_id"].to_list()
    assert items["title"].to_list() == catalog["title"].to_list()
    vectors = np.load(folder / "item_vectors.npy")
    np.testing.assert_array_equal(np.array(items["vector"].to_list(), np.float32), vectors)
    with safe_open(folder / "weights.safetensors", "np") as weights:
        names = set(weights.keys())
    assert any("item_projector" in name for name in names)
    assert not any("layers." in name for name in names), "weights of the language model"
    users = set(pl.read_parquet(world / "users.parquet")["raw_id"])
    held = contents(folder)
    assert not [name for name, data in held.items() for user in users if f'"{user}"'.encode() in data], "users"
    assert not [name for name in held if name.endswith((".tar", "users.parquet", "moments.safetensors"))]
    assert "tokenizer/tokenizer.json" in held
    assert {"teacher/weights.safetensors", "teacher/config.yaml"} <= set(held)
    assert set(contents(exported)) - set(held) == set()


def test_the_model_card(movable: Path) -> None:
    card = ModelCard.load(movable / "export/README.md")
    assert card.data.license == "apache-2.0"
    assert card.data.eval_results
    metrics = json.loads((movable / "export/metrics.json").read_text())
    original = next(result for result in metrics if result["history"] == "original")["metrics"]["HR@10"]
    assert card.data.eval_results[0].metric_value == round(original["value"], 4)
    interval = f"{original['value']:.4f} ({original['low']:.4f} to {original['high']:.4f})"
    assert interval in card.text
    assert "## Not for" in card.text
    assert "{{" not in card.text
    assert "{%" not in card.text


@pytest.mark.parametrize("name", ["weights.safetensors", "item_vectors.npy", "dataset/catalog.parquet", "config.yaml"])
def test_damage_is_named(exported: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(exported, tmp_path / "export")
    data = bytearray((tmp_path / "export" / name).read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "export" / name).write_bytes(data)
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        trainer.load_run(tmp_path / "export")


def test_an_export_can_be_the_teacher_of_a_new_run(world: Path, exported: Path, tiny_llm: Path, tmp_path: Path) -> None:
    from trainer.config import parse_config
    from trainer.runs.preflight import preflight

    config = parse_config(llm_srec_config(world, tmp_path / "run", exported, tiny_llm), "test")
    assert preflight(config, 1).sources.teacher


_Broken = Callable[[Path], object]


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (lambda path: path.write_text("[]"), "is damaged"),
        (lambda path: path.write_text('{"format": 99}'), "is an export of format 99, this version reads 1"),
        (lambda path: path.write_text("{" * 5000), "is damaged"),
        (lambda path: path.write_text(path.read_text().replace("config.yaml", "../config.yaml")), "is not a file in"),
    ],
)
def test_hostile_facts(exported: Path, tmp_path: Path, break_it: _Broken, says: str) -> None:
    shutil.copytree(exported, tmp_path / "export")
    break_it(tmp_path / "export/export.json")
    with pytest.raises(ValueError, match=says):
        trainer.load_run(tmp_path / "export")


def test_refusals(teacher: Path, exported: Path, tmp_path: Path, refused: Refused) -> None:
    main: Main = export.main
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    assert "is not empty: name a new folder" in refused(main, teacher, tmp_path / "full")
    assert "is an export already" in refused(main, exported, tmp_path / "new")
    assert "name a folder for the export" in refused(main, teacher)
    assert "sasrec has no language model: leave --llm out" in refused(main, teacher, tmp_path / "new", "--llm", "x")
    assert "write OWNER/NAME" in refused(main, exported, "--push", "name")
    assert "add --push" in refused(main, exported, "--dry-run")
    copy = trainer.load_run(exported)
    with pytest.raises(ValueError, match="is an export, which holds no users"):
        copy.recommend(users=["u1"])
    with pytest.raises(ValueError, match="is an export, which holds no users"):
        copy.evaluate()
