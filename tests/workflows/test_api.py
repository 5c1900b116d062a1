"""The Python API on a trained run: scores are products of its vectors, and what it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import ROOT

import trainer
from launchers.evaluate import main as evaluate

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def run(teacher: Path) -> trainer.Run:
    return trainer.load_run(teacher)


def test_a_score_is_the_product_of_the_vectors(run: trainer.Run) -> None:
    history = trainer.History([run.items.titles[4], run.items.ids[7], run.items.ids[4]])
    [answer] = run.recommend([history], k=100, exclude_seen=False)
    items = run.item_vectors()
    score = dict(zip(items.item_ids, (run.user_vectors([history]) @ items.vectors.T)[0], strict=True))
    assert [item.item_id for item in answer.recommendations] == sorted(score, key=lambda item: -score[item])
    np.testing.assert_allclose(
        [item.score for item in answer.recommendations], sorted(score.values(), reverse=True), atol=1e-4
    )
    assert items.item_ids == run.items.ids
    assert [seen.item_id for seen in answer.history] == [items.item_ids[row] for row in (4, 7, 4)]


def test_answers_come_one_by_one(run: trainer.Run) -> None:
    answers = run.recommend_each(users="all", k=1)
    assert next(answers).user_id == run.user_ids[0]
    assert [answer.user_id for answer in answers] == list(run.user_ids[1:])
    assert len(run.user_ids) == 61


def test_evaluation_of_a_sample_is_not_recorded(run: trainer.Run) -> None:
    before = (run.path / "results.jsonl").read_bytes()
    found = run.evaluate(["valid", "test"], users=9, candidates="full")
    assert list(found) == ["valid", "test"]
    assert found["test"].users == 9
    assert 0 <= found["test"].metrics["HR@10"].value <= 1
    assert (run.path / "results.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({}, "give one of the two"),
        ({"histories": [["i1"]], "users": ["u1"]}, "give one of the two"),
        ({"users": "u1"}, r"users='u1': give a list of raw user ids, or \"all\""),
        ({"users": []}, r"users=\[\]: give a list"),
        ({"users": ["u1"], "k": 0}, "ask for at least 1"),
        ({"users": ["u1"], "candidates": []}, "no candidate was given"),
        ({"histories": []}, "no history was given"),
        ({"histories": ["i1"]}, "not the text 'i1': put it in a list"),
    ],
)
def test_requests_that_are_refused_at_once(run: trainer.Run, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        run.recommend_each(**arguments)


def test_other_refusals(run: trainer.Run, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a run folder"):
        trainer.load_run(tmp_path)
    with pytest.raises(ValueError, match="takes no overrides: give them to load_config"):
        trainer.train(run.config, ["train.lr=1"])
    with pytest.raises(ValueError, match="users=0: give the number of users to sample"):
        run.evaluate(users=0)
    with pytest.raises(AttributeError, match="has no attribute 'recomend'"):
        trainer.recomend  # type: ignore[attr-defined]  # noqa: B018


def test_a_command_that_a_notebook_starts_meets_at_a_port_of_its_own(teacher: Path) -> None:
    """The notebook's group of one is still open, and its environment is inherited."""
    code = (
        "import subprocess, sys; from trainer.distributed import start; start(threads=1); "
        "command = [sys.executable, 'launchers/evaluate.py', *sys.argv[1:]]; "
        "done = subprocess.run(command, capture_output=True, text=True); "
        "sys.exit(done.stderr if done.returncode else 0)"
    )
    command = [sys.executable, "-c", code, str(teacher), "--users", "3"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


def test_a_dataset_that_has_moved_is_found(
    run: trainer.Run, teacher: Path, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = Path(shutil.copytree(teacher, tmp_path / "run"))
    config = moved / "config.yaml"
    config.write_text(config.read_text().replace(str(world), str(tmp_path / "gone")))
    with pytest.raises(ValueError, match=rf"gone is not a dataset .*, if the dataset of {moved} has moved, .* --data"):
        trainer.load_run(moved)
    found = trainer.load_run(moved, data=world)
    assert found.recommend(users=[run.user_ids[3]]) == run.recommend(users=[run.user_ids[3]])
    evaluate([str(moved), "--data", str(world), "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert printed["metrics"]["HR@10"]["value"] == run.evaluate()["test"].metrics["HR@10"].value
