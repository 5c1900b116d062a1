"""`launchers/plan.py`, run as a command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers import LLM_SYSTEMS, llm4rec_config, llm_srec_config, run_command, text_config, write_config

from launchers.plan import main
from trainer.config import ConfigError

pytestmark = pytest.mark.process

PLAN = "launchers/plan.py"


def test_a_plan_needs_neither_teacher_nor_weights(world: Path, tiny_llm: Path, tmp_path: Path) -> None:
    bare = tmp_path / "llm"
    bare.mkdir()
    for file in tiny_llm.glob("*.json"):
        shutil.copy(file, bare)
    preset = write_config(tmp_path / "run.yaml", llm_srec_config(world, tmp_path / "out", tmp_path / "no", bare))
    words = (PLAN, preset, "--devices", "2", "--kind", "h200")
    done = run_command(*words, "system.llm.dtype=bfloat16")
    assert done.returncode == 0, done.stderr
    assert "2 x NVIDIA H200" in done.stdout
    assert "Recommended: train.micro_batch_size=null engine.deepspeed=zero1" in done.stdout

    plan = json.loads(run_command(*words, "--json", "train.batch_size=12").stdout)
    assert plan["llm"]["layers"] == 3
    assert plan["steps_per_epoch"] == -(-61 // 12)
    assert plan["as_configured"]["fits"]
    assert plan["useful_tokens"] > plan["trained_tokens"] > 0
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_planned_is_a_one_line_error(world: Path, tiny_llm: Path, tmp_path: Path) -> None:
    tree = llm_srec_config(world, tmp_path / "out", tmp_path / "no", tiny_llm)
    preset = write_config(tmp_path / "run.yaml", tree)
    for words, cure in (
        (("--devices", "11", "--kind", "h200"), "11 devices cannot share a batch of 10 users"),
        (("--kind", "gaudi2"), "set system.llm.dtype=bfloat16"),
        (("--kind", "h200", f"system.llm.path={tmp_path}"), "config.json does not exist"),
    ):
        done = run_command(PLAN, preset, *words)
        assert done.returncode == 2
        assert cure in done.stderr
        assert done.stderr.count("\n") == 1


def test_a_system_that_cannot_be_planned_is_refused(world: Path, tmp_path: Path, tiny_encoder: Path) -> None:
    system = {"name": "recformer", "encoder": {"path": str(tiny_encoder)}}
    preset = write_config(tmp_path / "run.yaml", text_config(world, tmp_path / "out", system))
    with pytest.raises(ConfigError, match="recformer cannot be planned: only systems by id and those around a large"):
        main([str(preset), "--kind", "a6000"])


@pytest.mark.parametrize("name", ["sasrec", "gru4rec", "bert4rec", "nextitnet"])
def test_systems_by_id_are_planned(name: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = {"output": str(tmp_path / "out"), "data": {"path": str(world)}, "system": {"name": name}}
    preset = str(write_config(tmp_path / "run.yaml", tree))
    words = [preset, "train.batch_size=32", "train.epochs=2"]
    main([*words, "--kind", "a6000"])
    printed = capsys.readouterr().out
    assert f"{name} on {world}: " in printed
    assert "GB, fits" in printed
    found = []
    for batch_size in (32, 64):
        main([*words, "--kind", "a6000", "--json", f"train.batch_size={batch_size}"])
        found.append(json.loads(capsys.readouterr().out))
    once, twice = found
    assert once["parameters"] == twice["parameters"] > 0
    assert once["trained_bytes"] == 16 * once["parameters"]
    for key in ("step_flops", "activation_bytes"):
        assert twice[key] == pytest.approx(2 * once[key], rel=0.35), key
    assert once["steps_per_epoch"] == 2
    assert once["run_seconds"] == pytest.approx(2 * once["epoch_seconds"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", LLM_SYSTEMS)
def test_every_system_around_an_llm_is_planned(
    name: str, world: Path, tiny_llm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = {"teacher": tmp_path / "no", "stage1": tmp_path / "none"}
    tree = llm4rec_config(name, world, tmp_path / "out", tiny_llm, runs)
    tree["system"]["llm"] |= {"dtype": "bfloat16"}
    preset = str(write_config(tmp_path / "run.yaml", tree))
    main([preset, "--kind", "gaudi2"])
    printed = capsys.readouterr().out
    assert name in printed
    assert "add system.llm.packing=rows" in printed
    main([preset, "--kind", "gaudi2", "--json", "system.llm.packing=rows"])
    rows = json.loads(capsys.readouterr().out)
    main([preset, "--kind", "gaudi2", "--json"])
    stream = json.loads(capsys.readouterr().out)
    assert rows["trained_tokens"] > rows["useful_tokens"], "rows are padded"
    assert rows["as_configured"]["step_flops"] > stream["as_configured"]["step_flops"]
    adapted = name in ("tallrec", "llara", "collm")
    assert (stream["frozen_tokens"] == 0) == adapted, "with adapters there is no frozen stream"


def test_choosing_titles_is_planned(
    world: Path, tiny_llm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = llm4rec_config("llara", world, tmp_path / "out", tiny_llm, {"teacher": tmp_path / "no"}, metric="HR@1")
    tree["system"]["llm"] |= {"dtype": "bfloat16", "max_tokens": 512}
    preset = str(write_config(tmp_path / "run.yaml", tree | {"task": "generation"}))
    main([preset, "--kind", "h200"])
    assert "title generation: the LM head is counted" in capsys.readouterr().out
    main([preset, "--kind", "h200", "--json"])
    titles = json.loads(capsys.readouterr().out)
    main([preset, "--kind", "h200", "--json", "task=retrieval"])
    vectors = json.loads(capsys.readouterr().out)
    assert titles["trained_parameters"] < vectors["trained_parameters"], "no heads and tokens for read-outs"
    assert titles["useful_tokens"] != vectors["useful_tokens"]
    srec = llm_srec_config(world, tmp_path / "out", tmp_path / "no", tiny_llm) | {"task": "generation"}
    words = [str(write_config(tmp_path / "srec.yaml", srec)), "--kind", "h200"]
    with pytest.raises(ConfigError, match="llm_srec does not support task=generation"):
        main(words)


def test_a_plan_says_what_the_host_and_quantization_do(
    world: Path, tiny_llm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tiny LLM is bound by launches; loader processes are counted as configured."""
    tree = llm4rec_config("tallrec", world, tmp_path / "out", tiny_llm, {})
    tree["system"]["llm"] |= {"dtype": "bfloat16"}
    preset = str(write_config(tmp_path / "run.yaml", tree))
    main([preset, "--kind", "h200", "system.llm.quantization=fp8", "data.workers=1"])
    printed = capsys.readouterr().out
    assert "the host is the floor of a step" in printed
    assert "dropout of adapters: " in printed
    assert "the first is counted" in printed
    assert "1 loader process(es)" in printed
    assert "fp8: a step runs at 0." in printed, "rounding inputs launches more kernels"
    main([preset, "--kind", "h200"])
    printed = capsys.readouterr().out
    assert "which a thread that works ahead cannot hide" in printed, "it shares the interpreter with the launches"
    assert "unless data.workers=" in printed
    main([preset, "--kind", "gaudi2"])
    printed = capsys.readouterr().out
    assert "the second is counted" in printed
    assert "kernels per step" not in printed, "not known for a Gaudi"


def test_scores_of_the_batch_are_in_the_plan(
    world: Path, tiny_llm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their terms travel, and their score matrix takes memory, more if the teacher's scores are distilled."""
    tree = llm_srec_config(world, tmp_path / "out", tmp_path / "no", tiny_llm, batch_size=60)
    tree["system"] |= {"train_candidates": "batch", "user_vector": "end"}
    preset = str(write_config(tmp_path / "run.yaml", tree))
    seconds = []
    for weight in (0.0, 1.0):
        main([preset, "--kind", "h200", "--devices", "2", "--json", f"system.score_distill_weight={weight}"])
        found = json.loads(capsys.readouterr().out)["as_configured"]
        seconds.append(found["device_seconds"])
    assert seconds[1] > seconds[0]
