"""The table of a comparison: which runs are ranked, their labels, and the settings that tell them apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trainer.config import parse_config
from trainer.evaluation.ranking import Estimate
from trainer.reports.results import Result
from trainer.workflows.comparing.comparison import ComparedRun
from trainer.workflows.comparing.table import Outcome, differences, is_stage, labels, record, table

ENCODER = {"encoder": {"path": "encoder"}}
SYSTEMS: dict[str, dict[str, Any]] = {
    "sasrec": {"name": "sasrec"},
    "wide": {"name": "sasrec", "dim": 96},
    "llara": {"name": "llara", "teacher": "runs/sasrec", "llm": {"path": "llm"}},
    "stage1": {"name": "a_llmrec_stage1", "teacher": "runs/sasrec", **ENCODER},
    "a_llmrec": {"name": "a_llmrec", "teacher": "runs/sasrec", "stage1": "runs/stage1", "llm": {"path": "llm"}},
    "pretrain": {"name": "recformer_pretrain", **ENCODER},
    "first": {"name": "recformer", "pretrained": "runs/pretrain", **ENCODER},
    "second": {"name": "recformer", "stage": 2, "stage1": "runs/first", **ENCODER},
    "align": {"name": "ctrl_align", **ENCODER},
}


def planned(name: str, folder: str = "presets", **train: Any) -> ComparedRun:
    tree = {"output": f"runs/{name}", "data": {"path": "data"}, "system": SYSTEMS[name], "train": train}
    return ComparedRun(Path(folder, f"{name}.yaml"), (), parse_config(tree, name))


def outcome(run: ComparedRun, ndcg: float) -> Outcome:
    result = Result(
        run="folder", system=run.config.system.name, dataset="world", dataset_fingerprint="9f", config_hash="a1",
        commit="0", split="test", task="retrieval", candidates="sampled", num_candidates=100, history="original",
        tie="expectation", step=1, users=60, metrics={"NDCG@10": Estimate(ndcg, ndcg, ndcg)}, seconds=1.0, tokens=1,
        peak_memory_bytes=1, device="cpu", created="2025-03-08T12:00:00+00:00",
    )  # fmt: skip
    return Outcome(run, [result])


def test_stages_are_not_ranked() -> None:
    """Teachers are ranked: SASRec is a recommender, and whether its students beat it is the question."""
    runs = [planned(name) for name in SYSTEMS]
    assert [run.name for run in runs if is_stage(run, runs)] == ["stage1", "pretrain", "first", "align"]
    alone = [planned("first"), planned("sasrec")]
    assert not is_stage(alone[0], alone), "without a second stage the first one is the system"


@pytest.mark.parametrize("style", ["text", "markdown"])
def test_the_table_ranks_systems_and_names_what_they_built_on(style: Any) -> None:
    quality = {"sasrec": 0.4, "a_llmrec": 0.5, "stage1": 0.6, "second": 0.3, "first": 0.2, "align": 0.1}
    outcomes = [outcome(planned(name), value) for name, value in quality.items()]
    lines = table(outcomes, style).splitlines()
    rows = [line.strip("| ").split()[0] for line in lines if " 60 " in line]
    assert rows == ["a_llmrec", "sasrec", "recformer"]
    assert [line for line in lines if "not ranked" in line] == [
        "not ranked: stage1, which a_llmrec built on (NDCG@10 0.6000)",
        "not ranked: first, which second built on (NDCG@10 0.2000)",
        "not ranked: align, which other systems build on (NDCG@10 0.1000)",
    ]
    runs = [found.run for found in outcomes]
    ranked = {found.run.name: record(found, runs)["ranked"] for found in outcomes}
    assert ranked == {name: name in ("sasrec", "a_llmrec", "second") for name in quality}


def test_runs_of_one_system_are_told_apart() -> None:
    runs = [planned("sasrec", epochs=3), planned("wide", epochs=3), planned("wide", "other", epochs=4)]
    assert list(labels(runs).values()) == ["sasrec", "presets/wide.yaml", "other/wide.yaml"]
    assert differences(runs[0], runs) == "system.dim=64, train.epochs=3"
    assert differences(runs[1], runs[:2]) == "system.dim=96"
    assert differences(runs[0], runs[:1]) == ""
    text = table([outcome(run, 0.1 + number / 10) for number, run in enumerate(runs)], "text")
    rows = [line for line in text.splitlines() if "   60 " in line]
    assert [row.split("  ")[0] for row in rows] == ["sasrec (ot…ide.yaml)", "sasrec (pr…ide.yaml)", "sasrec"]
    assert "sasrec (other/wide.yaml): system.dim=96, train.epochs=4\n" in text


def test_nothing_to_rank() -> None:
    assert table([Outcome(planned("sasrec"), error="broken")], "text") == "no results\n"
    assert table([outcome(planned("pretrain"), 0.25)], "text") == (
        "no results\n\nnot ranked: pretrain, which other systems build on (NDCG@10 0.2500)\n"
    )
