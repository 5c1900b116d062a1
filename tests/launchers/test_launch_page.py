"""`launchers/page.py` on trained runs, and the item vectors that TensorBoard shows of them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from launch_helpers import Refused, Trained

from launchers import page
from trainer.distributed import start
from trainer.reports.results import read
from trainer.reports.user_ranks import read_ranks
from trainer.runs.folder import RunFolder
from trainer.runs.preflight import check_saved_run
from trainer.workflows.answers import answer, questions
from trainer.workflows.load_run import load_run

pytestmark = pytest.mark.process


def write(out: Path, *words: str | Path) -> str:
    page.main([*map(str, words), "--out", str(out)])
    return out.read_text()


def test_the_page_of_two_runs(srec: Trained, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    html = write(tmp_path / "page.html", srec.output, teacher, "--popularity", "--cases", "2")
    assert capsys.readouterr().out == f"{tmp_path / 'page.html'}\n"
    for section in (
        "What was run",
        "Quality",
        "User by user",
        "Cases",
        "Curves",
        "Throughput and memory",
        "Provenance",
    ):
        assert f"<h2>{section}</h2>" in html
    original, shuffled = read(srec.output / "results.jsonl")
    for result in (original, shuffled, *read(teacher / "results.jsonl")):
        assert f"{result.metrics['NDCG@10'].value:.4f}" in html
    assert ">popularity<" in html
    assert html.count('<article class="case">') == 6
    assert len(re.findall(r'<div class="answer( best)?">', html)) == 12
    for run in (srec.output, teacher):
        assert RunFolder(run).best().weights_sha256 in html
    assert original.dataset_fingerprint in html
    # The teacher is trained first, wherever it is named.
    commands = re.search(r"<pre><code>(.*?)</code></pre>", html, re.DOTALL)
    assert commands is not None
    assert commands[1].index(f"{teacher.name}.yaml") < commands[1].index(f"{srec.output.name}.yaml")
    assert "llm-srec page" in commands[1]


def test_answers_are_those_of_the_evaluation(srec: Trained, teacher: Path) -> None:
    for run in (srec.output, teacher):
        original, shuffled = read(run / "results.jsonl")
        loaded = load_run(check_saved_run(run), start(threads=1))
        asked = questions(loaded.dataset, "test", "sampled", np.arange(0, 61, 7))
        for result in (original, shuffled):
            found = answer(
                loaded.system.vectors,
                loaded.item_vectors,
                asked,
                torch.device("cpu"),
                top=3,
                history=result.history,
                seed=loaded.config.evaluation.seed,
            )
            kept = read_ranks(run, result)
            rows = np.searchsorted(kept.user_U, asked.histories.user_U)
            assert [ranked.rank for ranked in found] == (1 + kept.ranks.greater + kept.ranks.ties)[rows].tolist()
            for ranked, target, items in zip(found, asked.target_B, asked.ranked, strict=True):
                assert (ranked.rank <= 3) == (target in ranked.top)
                assert set(ranked.top) <= set(items.tolist())


def test_the_full_catalog_is_ranked_without_the_history(teacher: Path) -> None:
    dataset = load_run(check_saved_run(teacher), start(threads=1)).dataset
    asked = questions(dataset, "test", "full", np.array([3, 50]))
    for row, items in enumerate(asked.ranked):
        history = set(asked.histories.take(np.array([row])).item_E.tolist())
        assert items[0] == asked.target_B[row]
        assert set(items.tolist()) == set(range(1, dataset.num_items + 1)) - history | {int(items[0])}
        assert len(items) == len(set(items.tolist()))


def test_a_run_without_results_and_without_a_checkpoint_has_a_page(srec: Trained, tmp_path: Path) -> None:
    run = Path(shutil.copytree(srec.output, tmp_path / "young"))
    shutil.rmtree(run / "checkpoints")
    (run / "results.jsonl").unlink()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "ti')  # it is being written
    html = write(tmp_path / "page.html", run)
    assert "No results yet" in html
    assert "<h2>Cases</h2>" not in html
    assert "young: uniformity" in html


def test_a_run_that_cannot_be_loaded_is_left_out_of_the_cases(
    srec: Trained, teacher: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = RunFolder(Path(shutil.copytree(srec.output, tmp_path / "moved")))
    config = run.config()
    llm = config.system.llm.model_copy(update={"path": str(tmp_path / "gone")})  # type: ignore[union-attr]
    run.write_config(config.model_copy(update={"system": config.system.model_copy(update={"llm": llm})}))
    html = write(tmp_path / "page.html", run.path, teacher)
    assert f"{run.path}: its answers are left out" in caplog.text
    assert set(re.findall(r"<h4>(.*?)</h4>", html)) == {teacher.name}


def test_the_page_of_what_is_no_run_is_refused(refused: Refused, tmp_path: Path) -> None:
    assert "is not a run folder" in refused(page.main, tmp_path)
    assert "--cases -1: give a number" in refused(page.main, tmp_path, "--cases", "-1")


def test_item_vectors_are_kept_for_the_projector(srec: Trained, teacher: Path) -> None:
    for run in (srec.output, teacher):
        step = json.loads((run / "checkpoints/best.json").read_text())["step"]
        lines = (run / f"{step:05d}/items/metadata.tsv").read_text().splitlines()
        assert lines[0] == "title\ttraining events"
        counts = [int(line.split("\t")[1]) for line in lines[1:]]
        assert (len(counts), counts) == (40, sorted(counts, reverse=True))
        vectors = np.loadtxt(run / f"{step:05d}/items/tensors.tsv", delimiter="\t")
        loaded = load_run(check_saved_run(run), start(threads=1))
        titles = [" ".join(title.split()) for title in loaded.dataset.titles]
        order = [titles.index(line.split("\t")[0]) for line in lines[1:]]
        if len(set(titles)) == 40:
            np.testing.assert_allclose(vectors, loaded.item_vectors[order].numpy(), atol=1e-4)
