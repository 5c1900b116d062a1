"""Results of an experiment, from numbers written by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shards.manifest import read_manifest
from trainer.config import ConfigError, parse_config
from trainer.config.presets import names_in
from trainer.evaluation.ranking import Estimate
from trainer.reports.page.render import render
from trainer.workflows.experiments.page import experiment_page
from trainer.workflows.experiments.pictures import draw
from trainer.workflows.experiments.planning import Budget, ExperimentPlan, plan_experiment
from trainer.workflows.experiments.report import Report
from trainer.workflows.experiments.results import Cell, Change, Numbers, PairedTest, Place
from trainer.workflows.experiments.spec import chosen_options, load_experiment, load_recipe


def planned(world: Path, name: str, recipe: str = "paper", seeds: int = 1, **changes: object) -> ExperimentPlan:
    experiment, chosen = load_experiment(Path(name)), load_recipe(Path(recipe))
    manifest = replace(read_manifest(world), name="Scientific")
    options = chosen_options(experiment, chosen, [])
    budget = Budget(chosen, world, manifest, Path("runs"), options, seeds=seeds)
    return plan_experiment(experiment, replace(budget, **changes))  # type: ignore[arg-type]


def cell(row: str, training: str, value: float) -> Cell:
    place = Place(row, training, "", "", "NDCG@10")
    seeds = {0: value - 0.01, 1: value + 0.01}
    return Cell(place, 61, seeds, Estimate(value, value - 0.02, value + 0.02), np.full(61, value))


@pytest.fixture
def report(world: Path) -> Report:
    values = {"SASRec": (0.3, 0.27), "LLM-SRec": (0.4, 0.39)}
    cells = [
        cell(row, name, v)
        for row, pair in values.items()
        for name, v in zip(("Original", "Shuffle"), pair, strict=True)
    ]
    changes = [
        Change(cells[1].place, Estimate(-0.1, -0.12, -0.08)),
        Change(cells[3].place, Estimate(-0.025, -0.05, 0.0)),
    ]
    tests = [PairedTest(cells[0].place, Estimate(0.1, 0.05, 0.15), 0.002, 0.01)]
    numbers = Numbers(tuple(cells), tuple(changes), tuple(tests))
    return Report("table3", planned(world, "table3", seeds=2), numbers, {"collm Original seed 0": "no memory"})


def test_the_paper_stands_beside_ours(report: Report) -> None:
    lines = report.markdown().splitlines()
    header = "| system | users | NDCG@10 · Original | paper | NDCG@10 · Shuffle | paper | change NDCG@10 | paper |"
    assert header in lines
    assert (
        "| SASRec | 61 | 0.3000 ±0.0200 (sd 0.0141) | 0.2918 | 0.2700 ±0.0200 (sd 0.0141) | 0.2688 | "
        "-10.0 % [-12.0 %, -8.0 %] | -7.9 % |" in lines
    )
    assert "| CoLLM | - | - | 0.3111 | - | 0.3181 | - | +2.2 % |" in lines
    assert "| NDCG@10 · Original | SASRec | +0.1000 | [+0.0500, +0.1500] | 0.0020 | 0.0100 |" in lines
    assert "* collm Original seed 0: no memory" in lines


def test_a_program_reads_the_same(report: Report, tmp_path: Path) -> None:
    files = report.write(tmp_path)
    assert [file.name for file in files] == ["results.json", "table.csv", "table.md"]
    document = json.loads(files[0].read_text())
    assert [found["paper"] for found in document["cells"]] == [0.2918, 0.2688, 0.3388, 0.3224]
    assert document["changes"][0]["paper"] == pytest.approx(-0.0788)
    assert {run["folder"] for run in document["runs"]} == {str(t.run.config.output) for t in report.plan.trained}
    assert files[1].read_text().splitlines()[2].startswith("SASRec,Shuffle,,,NDCG@10,61,2,0.27,0.25,0.29")


@pytest.mark.parametrize("picture", ["bars", "scatter"])
def test_pictures(report: Report, tmp_path: Path, picture: str) -> None:
    """Where matplotlib is installed: bars or points, with the names of the systems; equal numbers give equal files."""
    experiment = report.plan.experiment.model_copy(update={"picture": picture})
    drawn = replace(report, plan=replace(report.plan, experiment=experiment))
    first, second = (tmp_path / name for name in "ab")
    first.mkdir()
    second.mkdir()
    files = draw(drawn, first)
    assert [file.name for file in files] == ["picture.png", "picture.svg"]
    for file, again in zip(files, draw(drawn, second), strict=True):
        assert file.read_bytes() == again.read_bytes()


@pytest.mark.parametrize("recipe", ["paper", "movielens"])
@pytest.mark.parametrize("name", names_in("experiments"))
def test_packaged_experiments_can_be_planned(world: Path, name: str, recipe: str) -> None:
    """Every row and column is a run of its own with valid settings, after the runs that it builds on."""
    plan = planned(world, name, recipe)
    experiment = plan.experiment
    assert len(plan.trained) == len(experiment.systems) * len(experiment.rows) * len(experiment.training)
    outputs = [run.config.output for run in plan.runs]
    assert len(set(outputs)) == len(outputs)
    for number, run in enumerate(plan.runs):
        assert not any(run.builds_on(later) for later in plan.runs[number:])
        assert parse_config(run.config.model_dump(mode="json"), name) == run.config


def test_experiments_share_runs(world: Path) -> None:
    """LLM-SRec of Table 6 is that of Table 3, of Table 8 (c) and of Figure 3."""

    def folders(name: str, seeds: int = 1, **changes: object) -> set[Path]:
        plan = planned(world, name, "paper", seeds, **changes)
        return {run.config.output for run in plan.runs if run.config.system.name == "llm_srec"}

    [of_table6] = folders("table6")
    assert folders("figure3") == {of_table6}
    assert of_table6 in folders("table3") & folders("table8")
    assert folders("table3") < folders("table8")
    for overrides in (("train.max_steps=7",), ("sasrec:system.dim=32",), ("llm_srec:system.llm.path=other",)):
        assert folders("table6", overrides=overrides) != {of_table6}, "another length, teacher or LLM is another run"
    assert len(folders("table6", seeds=3)) == len(folders("table6", seeds=3, one_source=True)) == 3


def test_sources_are_trained_alike_only_if_asked(world: Path) -> None:
    def teachers(option: str) -> set[str]:
        plan = planned(world, "table8", options={"training_order": "history", "sources": option})
        return {run.config.data.training_order for run in plan.runs if run.config.system.name == "sasrec"}

    assert teachers("original") == {"original"}
    assert teachers("same") == {"original", "history"}


def test_options(world: Path) -> None:
    experiment, recipe = load_experiment(Path("table3")), load_recipe(Path("movielens"))
    assert chosen_options(experiment, recipe, []) == {"training_order": "sequence", "sources": "original"}
    assert chosen_options(experiment, recipe, ["training_order=history"])["training_order"] == "history"
    with pytest.raises(ConfigError, match="option training_order=all: what of a training sequence is shuffled"):
        chosen_options(experiment, recipe, ["training_order=all"])


def test_the_page_has_the_table_the_tests_and_what_failed(report: Report, tmp_path: Path) -> None:
    html = render(experiment_page(report, "llm-srec experiment table3 --data data/x"))
    assert "0.4000 ±0.0200" in html
    assert "Against llm_srec" in html
    assert "no memory" in html
    assert "llm-srec experiment table3 --data data/x" in html
    assert html.count('class="chart"') == 1
