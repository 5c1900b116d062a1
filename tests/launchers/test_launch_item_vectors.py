"""Item vectors kept in the run folder by the real commands."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT, llm4rec_config, run_command, run_ranks, text_config, write_config
from launch_helpers import Trained, contents

from launchers import evaluate, recommend
from trainer.config import load_config
from trainer.distributed import start
from trainer.evaluation.item_vectors import ItemVectorFile
from trainer.evaluation.rankers import Batches
from trainer.reports.results import read
from trainer.runs.folder import RunFolder
from trainer.runs.preflight import check_saved_run
from trainer.workflows.item_vectors import item_vector_file
from trainer.workflows.load_run import LoadedRun, load_run

pytestmark = pytest.mark.process

FILE = "item_vectors.safetensors"


@pytest.fixture
def run(srec: Trained, tmp_path: Path) -> Path:
    return Path(shutil.copytree(srec.output, tmp_path / "moved"))


def loaded(run: Path) -> LoadedRun:
    saved = check_saved_run(run)
    return load_run(saved, start(saved.config.engine.threads))


def no_encoding(*_: Any) -> Any:
    raise AssertionError("the catalog is encoded")


def test_commands_read_what_the_test_of_the_training_wrote(
    run: Path, deepspeed_imported: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """The same output as without the file, and no item is encoded."""
    written = (run / FILE).read_bytes()

    def outputs() -> tuple[str, list[list[float]]]:
        capfd.readouterr()
        recommend.main([str(run), "--user", "u7", "--json"])
        advice = capfd.readouterr().out
        found = []
        for words in (["--candidates", "full"], ["--users", "9"]):
            evaluate.main([str(run), *words, "--json"])
            metrics = json.loads(capfd.readouterr().out)["metrics"]
            found.append([estimate["value"] for estimate in metrics.values()])
        return advice, found

    (run / FILE).unlink()
    expected = outputs()
    assert (run / FILE).read_bytes() == written, "training and commands encode the same bits"
    monkeypatch.setattr(Batches, "encode_catalog", no_encoding)
    caplog.clear()
    with caplog.at_level(logging.INFO, "trainer"):
        assert outputs() == expected
    assert caplog.messages.count(f"item vectors read from {run / FILE}") == 3


def test_a_loaded_run_encodes_once(run: Path, deepspeed_imported: None) -> None:
    (run / FILE).unlink()
    one = loaded(run)
    assert one.item_vectors is one.item_vectors
    assert torch.equal(loaded(run).item_vectors, one.item_vectors)


def test_all_that_decides_the_vectors_is_in_the_facts(
    run: Path, deepspeed_imported: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = loaded(run)
    assert one.kept is not None

    def facts(**changes: Any) -> Any:
        checkpoint = changes.pop("checkpoint", one.checkpoint)
        words = [f"{key.replace('__', '.')}={value}" for key, value in changes.items()]
        config = load_config(run / "config.yaml", [f"output={run}", *words])
        evaluator = type(one.evaluator)(one.dataset, one.system.scoring, config.evaluation, one.evaluator.world)
        kept = item_vector_file(config, checkpoint, evaluator)
        assert isinstance(kept, ItemVectorFile)
        assert kept.path == run / FILE
        return kept.facts

    plain = facts()
    assert plain == one.kept.facts
    for change in (
        {"system__llm__kernels": "liger"},
        {"system__llm__dtype": "bfloat16"},
        {"system__llm__quantization": "int8"},
        {"system__llm__packing": "rows"},
        {"system__llm__layers": 2},
        {"system__llm__max_title_tokens": 8},
        {"system__llm__title_store": "/store"},
        {"system__prompt": "paper"},
        {"evaluation__batch_size": 15},
    ):
        assert facts(**change) != plain, change
    for change in ({"train__epochs": 9}, {"data__workers": 1}, {"engine__timeout": 5}, {"data__path": "/elsewhere"}):
        assert facts(**change) == plain, change
    monkeypatch.setattr("trainer.workflows.item_vectors.software", lambda: {"trainer": "changed"})
    assert facts() != plain
    monkeypatch.undo()
    torch.set_num_threads(2)
    assert facts() != plain
    torch.set_num_threads(1)
    assert facts() == plain


def test_other_weights_replace_the_vectors(run: Path) -> None:
    """As when training went on to a better checkpoint."""
    before, best = (run / FILE).read_bytes(), RunFolder(run).best()
    step = next(step for step in RunFolder(run).steps() if step != best.progress.step)
    (run / "checkpoints/best.json").write_text(RunFolder(run).best_json(step))
    found = []
    for _ in range(2):
        done = run_command("launchers/evaluate.py", run, "--json")
        assert done.returncode == 0, done.stderr
        found.append(((run / FILE).read_bytes(), json.loads(done.stdout)["metrics"]))
        (run / FILE).unlink()
    assert found[0][0] != before
    assert found[0] == found[1], "as encoded without a file"


def test_two_ranks(run: Path) -> None:
    """Two ranks round differently than one, so they encode once more, and read what they wrote from then on."""
    test_of_training = read(run / "results.jsonl")[0]
    alone = (run / FILE).read_bytes()
    run_ranks(2, ROOT / "launchers/evaluate.py", [str(run)])
    written = (run / FILE).read_bytes()
    assert written != alone
    inode = (run / FILE).stat().st_ino
    run_ranks(2, ROOT / "launchers/evaluate.py", [str(run)])
    assert (run / FILE).stat().st_ino == inode, "read, not written again"
    *_, first, second = read(run / "results.jsonl")
    assert second.metrics == first.metrics
    assert {name: e.value for name, e in first.metrics.items()} == pytest.approx(
        {name: e.value for name, e in test_of_training.metrics.items()}, abs=0.02
    )


def test_systems_whose_vectors_are_not_encoded_keep_none(
    teacher: Path, world: Path, tiny_llm: Path, tiny_encoder: Path, tmp_path: Path, deepspeed_imported: None
) -> None:
    """Tables and title scoring; CTRL's alignment reads sentences, and keeps them."""
    before = contents(teacher)
    assert FILE not in before
    assert run_command("launchers/recommend.py", teacher, "--user", "u7").returncode == 0
    assert contents(teacher) == before

    titles = llm4rec_config("tallrec", world, tmp_path / "titles", tiny_llm, {}, epochs=1, validate_every=1)
    titles["system"]["llm"]["max_tokens"] = 512
    titles |= {"task": "generation", "train": titles["train"] | {"metric": "HR@1"}}
    sentences = text_config(
        world,
        tmp_path / "sentences",
        {"name": "ctrl_align", "encoder": {"path": str(tiny_encoder)}, "backbone": {"name": "sasrec", "dim": 16}},
        epochs=1,
    )
    for tree, keeps in ((titles, False), (sentences, True)):
        preset = write_config(tmp_path / "preset.yaml", tree)
        done = run_command("launchers/train.py", preset)
        assert done.returncode == 0, done.stderr
        assert (Path(tree["output"]) / FILE).exists() == keeps
        assert (loaded(Path(tree["output"])).kept is not None) == keeps
