"""`train.init_from`: next week's dataset, another learning rate, and what cannot be carried over."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from helpers import llm_srec_config, run_command, sasrec_config, write_config
from launch_helpers import Refused, Trained
from safetensors.numpy import load_file

from launchers import train
from shards.__main__ import main as shards_main
from trainer.config import parse_config
from trainer.data.raw.items import RawItems
from trainer.data.reading.dataset import open_dataset
from trainer.models import build_system
from trainer.runs.folder import RunFolder

pytestmark = pytest.mark.process

STILL = {"lr": 1e-12, "max_steps": 1, "epochs": 1}
"""Training that leaves the weights as they were."""


@pytest.fixture(scope="module")
def next_week(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The world's users without two, one of whose items nobody else has; with new users and new items, in new order."""
    folder = tmp_path_factory.mktemp("next-week")
    reviews = pl.read_parquet(world.parent / "raw/reviews.parquet").filter(~pl.col("user").is_in(["u0", "u1"]))
    reviews = reviews.filter(pl.col("item") != "i5")
    new = reviews.filter(pl.col("user").is_in(["u2", "u3", "u4"])).with_columns(user="new-" + pl.col("user"))
    new = new.with_columns(item=pl.when(pl.col("item") == "i9").then(pl.lit("a-new-item")).otherwise("item"))
    extra = new.with_columns(item=pl.lit("a-new-item")).unique("user")
    pl.concat([reviews, new, extra]).write_parquet(folder / "reviews.parquet")
    items = pl.read_parquet(world.parent / "raw/items.parquet")
    pl.concat([items, pl.DataFrame({"item": ["a-new-item"], "title": ["A New Item"]})]).write_parquet(
        folder / "items.parquet"
    )
    code = shards_main(
        f"build {folder / 'dataset'} --source table --time-unit ms --reviews {folder / 'reviews.parquet'} "
        f"--meta {folder / 'items.parquet'} --min-item 1 --min-train 3 --negatives 19 --title-negatives 5 --shards 2 "
        "--name next".split()
    )
    assert code == 0
    return folder / "dataset"


def trained(tree: dict[str, Any], folder: Path, init_from: Path) -> Path:
    tree["train"] |= {"init_from": str(init_from)}
    done = run_command("launchers/train.py", write_config(folder / "preset.yaml", tree))
    assert done.returncode == 0, done.stderr
    assert f"started from {init_from}" in done.stderr
    return Path(tree["output"])


def rows(run: Path, data: Path) -> dict[str, Any]:
    """Rows of the item table by raw id."""
    items = RawItems.read(data, len(pl.read_parquet(data / "catalog.parquet")))
    table = load_file(RunFolder(run).best().weights)["items.weight"]
    return dict(zip(items.ids, table[1:], strict=True))


def test_rows_follow_raw_ids(world: Path, teacher: Path, next_week: Path, tmp_path: Path) -> None:
    tree = sasrec_config(next_week, tmp_path / "run", **STILL)
    run = trained(tree, tmp_path, teacher)
    old, new = rows(teacher, world), rows(run, next_week)
    assert new.keys() - old.keys() == {"a-new-item"}
    assert old.keys() - new.keys() == {"i5"}
    for raw_id in old.keys() & new.keys():
        np.testing.assert_allclose(new[raw_id], old[raw_id], atol=1e-9, err_msg=raw_id)
    dataset = open_dataset(next_week, full_check=False)
    fresh = build_system(parse_config(tree, "test"), dataset).model
    scratch = dict(fresh.named_parameters())["items.weight"].detach().numpy()
    place = RawItems.read(next_week, dataset.num_items).ids.index("a-new-item")
    np.testing.assert_allclose(new["a-new-item"], scratch[1 + place], atol=1e-9)

    report = json.loads((run / "warm_start.json").read_text())
    assert (report["items_new"], report["items_dropped"]) == (1, 1)
    assert report["items_carried"] == len(new) - 1
    assert report["users_new"] == 3
    assert report["parameters_new"] == 16
    assert report["parameters_carried"] == sum(p.numel() for p in fresh.parameters() if p.requires_grad) - 16


def test_a_finished_run_trains_on_with_another_schedule(world: Path, teacher: Path, tmp_path: Path) -> None:
    """It starts where the other one was best; resumes without it; and a different one is not taken for it."""
    source = Path(shutil.copytree(teacher, tmp_path / "source"))
    best = RunFolder(source).best()
    run = trained(sasrec_config(world, tmp_path / "run", **STILL), tmp_path, source)
    found = RunFolder(run).best()
    assert found.progress.best_value == pytest.approx(best.progress.best_value)
    assert found.identity.init_from == best.weights_sha256
    shutil.rmtree(source)
    preset = tmp_path / "preset.yaml"
    done = run_command("launchers/train.py", preset, "train.max_steps=3")
    assert done.returncode == 0, done.stderr
    assert "resuming from step 1" in done.stderr
    done = run_command("launchers/train.py", preset, f"train.init_from={teacher}")
    assert f"train.init_from is {source} there, {teacher} here" in done.stderr


def test_a_student_starts_from_a_student(
    srec: Trained, world: Path, next_week: Path, teacher: Path, tiny_llm: Path, tmp_path: Path
) -> None:
    """On the same data it ranks as before. With a teacher that was not started from the old one, it warns."""
    before = RunFolder(srec.output).best().progress.best_value
    run = trained(llm_srec_config(world, tmp_path / "run", teacher, tiny_llm, **STILL), tmp_path, srec.output)
    assert RunFolder(run).best().progress.best_value == pytest.approx(before)

    new_teacher = trained(sasrec_config(next_week, tmp_path / "teacher", **STILL), tmp_path, teacher)
    for name, start, warns in (("follows", new_teacher, False), ("apart", None, True)):
        if start is None:
            start = tmp_path / "unrelated"
            tree = sasrec_config(next_week, start, **STILL)
            assert run_command("launchers/train.py", write_config(tmp_path / "t.yaml", tree)).returncode == 0
        tree = llm_srec_config(next_week, tmp_path / name, start, tiny_llm, **STILL)
        tree["train"]["init_from"] = str(srec.output)
        done = run_command("launchers/train.py", write_config(tmp_path / "s.yaml", tree))
        assert done.returncode == 0, done.stderr
        assert ("the teacher is not the one of" in done.stderr) == warns, name
        assert json.loads((tmp_path / name / "warm_start.json").read_text())["parameters_new"] == 0


def test_title_vectors_of_another_catalog_are_refused(
    refused: Refused, world: Path, next_week: Path, teacher: Path, tiny_llm: Path, srec: Trained, tmp_path: Path
) -> None:
    def error(data: Path, source: Path, teacher: Path) -> str:
        tree = llm_srec_config(data, tmp_path / "run", teacher, tiny_llm)
        tree["system"]["teacher_titles"] = 0.5
        return refused(train.main, write_config(tmp_path / "preset.yaml", tree), f"train.init_from={source}")

    assert "has system.teacher_titles=0.0, this run has 0.5" in error(world, srec.output, teacher)
    titled = Path(shutil.copytree(srec.output, tmp_path / "titled"))
    config = (titled / "config.yaml").read_text()
    (titled / "config.yaml").write_text(config.replace("teacher_titles: 0.0", "teacher_titles: 0.5"))
    next_teacher = trained(sasrec_config(next_week, tmp_path / "teacher", **STILL), tmp_path, teacher)
    assert "system.teacher_titles=0.5 whitens titles over it: train from" in error(next_week, titled, next_teacher)


def test_what_cannot_be_carried_over(
    refused: Refused, world: Path, next_week: Path, teacher: Path, srec: Trained, tmp_path: Path
) -> None:
    def error(words: list[str], **system: Any) -> str:
        tree = sasrec_config(world, tmp_path / "run")
        tree["system"] |= system
        return refused(train.main, write_config(tmp_path / "preset.yaml", tree), *words)

    assert "nothing is not a run folder" in error([f"train.init_from={tmp_path / 'nothing'}"])
    assert "is a run of llm_srec, not of sasrec" in error([f"train.init_from={srec.output}"])
    assert "has system.dim=16, this run has 8: set system.dim=16" in error([f"train.init_from={teacher}"], dim=8)
    moved = Path(shutil.copytree(teacher, tmp_path / "moved"))
    config = (moved / "config.yaml").read_text()
    (moved / "config.yaml").write_text(config.replace(str(world), str(next_week)))
    assert "holds another one now: put that dataset back" in error([f"train.init_from={moved}"])
    (moved / "config.yaml").write_text(config.replace(str(world), str(tmp_path / "gone")))
    assert "which cannot be read" in error([f"train.init_from={moved}"])
    (moved / "config.yaml").write_text(config)
    for weights in moved.glob("checkpoints/step-*/weights.safetensors"):
        weights.write_bytes(weights.read_bytes()[:-4])
    assert "weights.safetensors is damaged" in error([f"train.init_from={moved}"])
    assert not (tmp_path / "run").exists()
