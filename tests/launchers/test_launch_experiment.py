"""`launchers/experiment.py` by real runs on the synthetic dataset."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import build_world, llm_srec_config, run_command, sasrec_config, write_config
from launch_helpers import Refused, contents

from launchers.evaluate import main as evaluate
from launchers.experiment import main
from shards.manifest import read_manifest
from trainer.config import ConfigError, dump_config
from trainer.reports.results import read
from trainer.runs.folder import RunFolder
from trainer.runs.other_dataset import check_other
from trainer.workflows.experiments.experiment import Asked, prepare

pytestmark = pytest.mark.process

SHUFFLED: dict[str, Any] = {
    "title": "Trained on shuffled sequences",
    "table": "Table 3",
    "systems": ["sasrec", "llm_srec"],
    "training": {"Original": {}, "Shuffle": {"data.training_order": "sequence"}},
    "metrics": ["NDCG@10", "HR@10"],
    "change": "training",
    "reference": "sasrec",
}
GROUPS: dict[str, Any] = {
    "title": "Both histories, by group",
    "systems": ["sasrec"],
    "histories": {"Original": "original", "Shuffle": "shuffled"},
    "groups": "transition",
    "change": "histories",
    "picture": "scatter",
}
SIMILARITY: dict[str, Any] = {
    "title": "Similarity",
    "systems": ["sasrec"],
    "measure": "similarity",
    "metrics": ["cosine_similarity"],
}
CASES: dict[str, Any] = {
    "title": "Who is right",
    "systems": ["sasrec", "faster"],
    "options": {"top": {"default": 5, "about": "right among this many"}},
    "cases": {"top": "$top", "examples": 1},
}


@pytest.fixture
def recipe(tmp_path: Path, world: Path, tiny_llm: Path) -> Path:
    """SASRec, and an LLM-SRec whose teacher fails once it has read the dataset, which has too few items for it."""
    presets = {
        "sasrec": sasrec_config(world, tmp_path / "unused", epochs=1),
        "llm_srec": llm_srec_config(world, tmp_path / "unused", tmp_path / "unused", tiny_llm, epochs=1),
    }
    files = {name: str(write_config(tmp_path / f"{name}.yaml", tree)) for name, tree in presets.items()}
    systems: dict[str, dict[str, Any]] = {
        "sasrec": {"preset": files["sasrec"]},
        "faster": {"preset": files["sasrec"], "set": {"train.lr": 5.0e-3}},
        "broken": {"preset": files["sasrec"], "set": {"system.loss": "gbce", "system.negatives": 99}},
        "llm_srec": {"preset": files["llm_srec"], "builds_on": {"teacher": "broken"}},
    }
    return write_config(tmp_path / "recipe.yaml", {"title": "tiny", "systems": systems})


def asked(experiment: Path, world: Path, recipe: Path, root: Path, *more: str | Path) -> list[str | Path]:
    return [experiment, "--data", world, "--recipe", recipe, "--runs", root, "--out", root / experiment.stem, *more]


def trainings(stderr: str) -> int:
    return stderr.count(" trained parameters, ")


def test_experiments_share_their_runs(tmp_path: Path, world: Path, recipe: Path) -> None:
    """A failing system does not stop others; nothing is repeated; other experiments use the same runs."""
    files = {
        name: write_config(tmp_path / f"{name}.yaml", tree)
        for name, tree in {"shuffled": SHUFFLED, "groups": GROUPS, "similarity": SIMILARITY}.items()
    }
    root = tmp_path / "runs"
    words = asked(files["shuffled"], world, recipe, root)
    dry = run_command("launchers/experiment.py", *words, "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert not root.exists()
    states = [
        line.split(": ", 1)[1] for line in dry.stdout.splitlines() if line.lstrip().startswith(("1 ", "2 ", "3 ", "4 "))
    ]
    assert states == ["trains", "trains", "trains", "trains after broken seed 0"]
    assert dry.stdout.endswith("0 of 5 runs done, 5 left\n")

    # By a warm process, and so with a run that the command finds finished.
    request = Asked(files["shuffled"], world, recipe, root=root)
    original = prepare(request).runs[0]
    trained = run_command("launchers/train.py", original.preset, *original.overrides)
    assert trained.returncode == 0, trained.stderr
    first = run_command("launchers/experiment.py", *words)
    assert first.returncode == 2
    assert trainings(first.stderr) == 1
    assert "* broken seed 0: system.negatives=99, but gbce can use at most 39" in first.stdout
    assert "* llm_srec Shuffle seed 0: not started because it builds on broken seed 0, which failed" in first.stdout
    assert first.stderr.endswith("error: 3 of 5 runs failed: fix them and run the same command again\n")
    assert "== 3/5 broken seed 0: " in first.stderr
    assert "; 2 of 5 runs done, 3 left, about " in first.stderr

    found = json.loads((root / "shuffled" / "results.json").read_text())
    folder = {run["training"]: Path(run["folder"]) for run in found["runs"] if run["system"] == "sasrec"}
    for training, path in folder.items():
        [tested] = [result for result in read(path / "results.jsonl") if result.history == "original"]
        cells = {cell["metric"]: cell for cell in found["cells"] if cell["training"] == training}
        assert set(cells) == {"NDCG@10", "HR@10"}
        for metric, cell in cells.items():
            assert cell["value"] == pytest.approx(tested.metrics[metric].value, abs=1e-12)
            assert cell["seeds"] == {"0": pytest.approx(cell["value"])}
    assert RunFolder(folder["Shuffle"]).config().data.training_order == "sequence"
    value = {cell["training"]: cell["value"] for cell in found["cells"] if cell["metric"] == "NDCG@10"}
    [change] = [change for change in found["changes"] if change["metric"] == "NDCG@10"]
    assert change["value"] == pytest.approx(value["Shuffle"] / value["Original"] - 1)
    assert change["low"] <= change["value"] <= change["high"]
    rows = list(csv.DictReader((root / "shuffled" / "table.csv").read_text().splitlines()))
    assert [row["value"] for row in rows] == [str(cell["value"]) for cell in found["cells"]]
    assert f"| SASRec | 61 | {value['Original']:.4f} ±" in first.stdout

    before = {name: text for name, text in contents(root).items() if not name.startswith("shuffled/")}
    groups = run_command("launchers/experiment.py", *asked(files["groups"], world, recipe, root))
    assert groups.returncode == 0, groups.stderr
    assert trainings(groups.stderr) == 0
    after = {name: text for name, text in contents(root).items() if name.split("/")[0] not in ("shuffled", "groups")}
    assert after == before

    cells = json.loads((root / "groups" / "results.json").read_text())["cells"]
    mean = {
        history: np.average(
            [c["value"] for c in cells if c["history"] == history],
            weights=[c["users"] for c in cells if c["history"] == history],
        )
        for history in ("Original", "Shuffle")
    }
    by_history = {
        result.history: result.metrics["NDCG@10"].value for result in read(folder["Original"] / "results.jsonl")
    }
    assert mean == pytest.approx({"Original": by_history["original"], "Shuffle": by_history["shuffled"]})

    similar = run_command("launchers/experiment.py", *asked(files["similarity"], world, recipe, root))
    assert similar.returncode == 0, similar.stderr
    [cell] = json.loads((root / "similarity" / "results.json").read_text())["cells"]
    assert cell["users"] == 61
    assert -1 < cell["value"] < 0.9999

    cases = write_config(tmp_path / "cases.yaml", CASES)
    right = run_command("launchers/experiment.py", *asked(cases, world, recipe, root))
    assert right.returncode == 0, right.stderr
    assert trainings(right.stderr) == 1
    table = right.stdout.split("## Who is right")[1]
    lines = [line.split("|") for line in table.splitlines()]
    counts = {row[1].strip(): int(row[2]) for row in lines if len(row) == 5 and "right" in row[1]}
    assert list(counts) == ["all are right", "only SASRec is right", "only faster is right", "none is right"]
    assert sum(counts.values()) == 61
    [tested] = [result for result in read(folder["Original"] / "results.jsonl") if result.history == "original"]
    assert (counts["all are right"] + counts["only SASRec is right"]) / 61 == pytest.approx(
        tested.metrics["HR@5"].value
    )
    examples = (root / "cases" / "cases.md").read_text()
    shown = sum(count > 0 for count in counts.values())
    assert examples.count("\n## User ") == examples.count("\n* SASRec ranks it ") == shown
    assert (root / "cases" / "page.html").read_text().count('<article class="case">') == shown


def test_a_stopped_teacher_is_resumed(tmp_path: Path, world: Path, recipe: Path) -> None:
    """One that has no checkpoint yet is no obstacle: the experiment trains it before it is read."""
    request = Asked(write_config(tmp_path / "shuffled.yaml", SHUFFLED), world, recipe, root=tmp_path / "runs")
    teacher = next(run for run in prepare(request).runs if run.label == "broken seed 0")
    teacher.config.output.mkdir(parents=True)
    (teacher.config.output / "config.yaml").write_text(dump_config(teacher.config))
    assert [run.label for run in prepare(request).runs].index("broken seed 0") == 2


def test_what_cannot_be_run_is_refused(tmp_path: Path, world: Path, recipe: Path, refused: Refused) -> None:
    def error(tree: dict[str, Any], *more: str | Path, recipe: Path = recipe) -> str:
        file = write_config(tmp_path / "bad.yaml", tree)
        return refused(main, *asked(file, world, recipe, tmp_path / "runs", *more))

    assert "did you mean 'table3'?" in refused(main, "table33", "--data", world)
    assert "is not a dataset" in refused(main, "table3", "--data", tmp_path)
    assert "--systems gru: this experiment has sasrec, llm_srec" in error(SHUFFLED, "--systems", "gru")
    assert "--set train.lrr=1: no system" in error(SHUFFLED, "--set", "train.lrr=1")
    assert "--option order=1: write NAME=VALUE (options of this experiment: none)" in error(
        SHUFFLED, "--option", "order=1"
    )
    assert "are trained alike: leave out the --set" in error(SHUFFLED, "--set", "data.training_order=history")
    assert "metric MAP is not one of measure: ranking" in error(SHUFFLED | {"metrics": ["MAP"]})
    assert "change: histories compares two columns, but there is one" in error(SHUFFLED | {"change": "histories"})
    assert "'colour': Extra inputs" in error(SHUFFLED | {"colour": 1})
    assert "the recipe has no system 'bert' (one of: sasrec, faster, broken, llm_srec)" in error(
        SHUFFLED | {"systems": ["bert"]}
    )
    assert "the experiment uses the option $order, which it does not have" in error(SHUFFLED | {"sources": "$order"})
    assert "--seeds 0" in error(SHUFFLED, "--seeds", "0")
    tree = json.loads(recipe.read_text())
    del tree["systems"]["llm_srec"]["builds_on"]
    alone = write_config(tmp_path / "alone.yaml", tree)
    assert "the recipe gives llm_srec no teacher: add `builds_on: {teacher: NAME}`" in error(SHUFFLED, recipe=alone)
    assert not (tmp_path / "runs").exists()


def test_another_dataset_and_similarity(tmp_path: Path, world: Path, teacher: Path, refused: Refused) -> None:
    """Results on another dataset are kept apart from the run's own."""
    run = tmp_path / "sasrec"
    shutil.copytree(teacher, run)
    own = (run / "results.jsonl").read_bytes()
    other = build_world(tmp_path, users=30, items=55, shards=1)
    done = run_command("launchers/evaluate.py", run, "--data", other, "--json")
    assert done.returncode == 0, done.stderr
    [file] = run.glob("elsewhere/*-mean/results.jsonl")
    [result] = read(file)
    assert result.users == 30
    assert result.metrics["HR@10"].value == pytest.approx(0.5), "every candidate is tied"
    assert json.loads(done.stdout)["dataset_fingerprint"] == result.dataset_fingerprint
    assert (run / "results.jsonl").read_bytes() == own
    similar = run_command("launchers/evaluate.py", run, "--similarity")
    assert "cosine of user vectors, original and shuffled history 0." in similar.stdout
    assert "(61 users)" in similar.stdout
    with pytest.raises(ConfigError, match="has the items that the run was trained on"):
        check_other(world, read_manifest(world))
    assert "leave out --data" in refused(evaluate, run, "--data", other, "--similarity")
