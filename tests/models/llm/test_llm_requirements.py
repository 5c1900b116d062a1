"""Configurations of LLM recommenders that fail in the preflight."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import llm4rec_config

from shards.manifest import read_manifest
from trainer.config import ConfigError, parse_config
from trainer.runs.folder import CheckpointError
from trainer.runs.requirements import check_requirements, check_task


def _refused(world: Path, model: Path, name: str, runs: dict[str, Path], **system: Any) -> str:
    tree = llm4rec_config(name, world, Path("unused"), model, runs)
    tree["system"] |= system
    with pytest.raises((ConfigError, CheckpointError)) as caught:
        check_requirements(parse_config(tree, "test"), read_manifest(world))
    return str(caught.value)


def test_adapters_in_quantized_weights(world: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": {"bits": 8}}))
    error = _refused(world, tmp_path, "tallrec", {})
    assert "system.lora cannot adapt" in error
    assert "bf16 or fp32" in error
    for name in ("int8", "fp8"):
        llm = {"path": "owner/model", "quantization": name}
        error = _refused(world, tmp_path, "tallrec", {}, llm=llm)
        assert f"system.lora cannot adapt an LLM in {name}: set system.llm.quantization=none" in error


def test_fp8_gives_bfloat16(world: Path, tiny_llm: Path, teacher: Path) -> None:
    llm = {"path": str(tiny_llm), "quantization": "fp8", "dtype": "float32"}
    error = _refused(world, tiny_llm, "llm_srec", {"teacher": teacher}, llm=llm)
    assert "fp8 computes in bfloat16, not in float32: set system.llm.dtype=bfloat16, or quantization=none" in error


def test_a_user_with_very_many_items_has_few_targets(world: Path, tiny_llm: Path) -> None:
    manifest = read_manifest(world)
    statistics = replace(manifest.statistics, max_length=1_000_000)
    tree = llm4rec_config("tallrec", world, Path("unused"), tiny_llm, {})
    for targets in ("last", "window", "all"):
        tree["system"]["targets"] = targets
        check_requirements(parse_config(tree, "test"), manifest)
        if targets != "all":
            check_requirements(parse_config(tree, "test"), replace(manifest, statistics=statistics))
    with pytest.raises(ConfigError, match=r"has 1,000,000: set system\.targets=window or last"):
        check_requirements(parse_config(tree, "test"), replace(manifest, statistics=statistics))


def test_a_window_in_random_order_has_one_target(world: Path, tiny_llm: Path) -> None:
    tree = llm4rec_config("tallrec", world, Path("unused"), tiny_llm, {})
    tree["data"]["training_order"] = "window"
    check_requirements(parse_config(tree, "test"), read_manifest(world))
    tree["system"]["targets"] = "all"
    with pytest.raises(ConfigError, match=r"system\.targets=all has others: set data\.training_order=sequence"):
        check_requirements(parse_config(tree, "test"), read_manifest(world))


def test_a_second_stage_without_the_first(world: Path, tiny_llm: Path, teacher: Path) -> None:
    error = _refused(world, tiny_llm, "a_llmrec", {"teacher": teacher, "stage1": Path("nowhere")})
    assert "system.stage1=nowhere is not a run folder: train one with" in error
    assert "`llm-srec train a_llmrec_stage1 data.path=" in error
    error = _refused(world, tiny_llm, "a_llmrec", {"teacher": teacher, "stage1": teacher})
    assert f"system.stage1={teacher} is a sasrec run, not a a_llmrec_stage1 run" in error


@pytest.mark.parametrize("name", ["llara", "collm", "a_llmrec"])
def test_vectors_without_a_teacher(world: Path, tiny_llm: Path, name: str) -> None:
    runs = {"teacher": Path("nowhere"), "stage1": Path("nowhere")}
    assert "system.teacher=nowhere is not a run folder: train one with" in _refused(world, tiny_llm, name, runs)


def test_keys_that_a_system_does_not_have() -> None:
    tree = llm4rec_config("a_llmrec", Path("d"), Path("o"), Path("m"), {"teacher": Path("t"), "stage1": Path("s")})
    tree["system"]["lora"] = {"rank": 4}
    with pytest.raises(ConfigError, match=r"unknown key 'system\.lora'"):
        parse_config(tree, "test")
    del tree["system"]["lora"], tree["system"]["stage1"]
    with pytest.raises(ConfigError, match=r"missing key 'system\.stage1'"):
        parse_config(tree, "test")


def test_changed_adapters_keep_the_other_official_values() -> None:
    tree = llm4rec_config("llara", Path("d"), Path("o"), Path("m"), {"teacher": Path("t")})
    tree["system"]["lora"] = {"rank": 4}
    lora = parse_config(tree, "test").system.lora  # type: ignore[union-attr]
    assert (lora.rank, lora.alpha, lora.dropout, len(lora.targets)) == (4, 32, 0.1, 7)


@pytest.mark.parametrize(
    ("name", "llm", "changes", "why"),
    [
        ("tallrec", {}, {}, "tallrec trains adapters, which change the KV cache of titles"),
        ("a_llmrec", {}, {"task": "generation"}, "task=generation has no item prompts"),
        ("llm_srec", {"packing": "rows"}, {}, "system.llm.packing=rows runs whole prompts"),
    ],
)
def test_a_title_store_where_it_cannot_be_used(
    name: str, llm: dict[str, str], changes: dict[str, str], why: str, world: Path, tiny_llm: Path, teacher: Path,
    stage1: Path,
) -> None:  # fmt: skip
    runs = {"teacher": teacher, "stage1": stage1}
    tree = llm4rec_config(name, world, Path("unused"), tiny_llm, runs, metric="HR@1") | changes
    tree["system"]["llm"] |= {"title_store": "store"} | llm
    with pytest.raises(ConfigError) as caught:
        check_requirements(parse_config(tree, "test"), read_manifest(world))
    assert str(caught.value) == f"system.llm.title_store cannot be used because {why}: leave it out"


def _refused_generation(world: Path, llm: Path, name: str, runs: dict[str, Path], **changes: Any) -> str:
    tree = llm4rec_config(name, world, Path("unused"), llm, runs, metric=changes.pop("metric", "HR@1"))
    with pytest.raises(ConfigError) as caught:
        check_requirements(parse_config(tree | {"task": "generation"} | changes, "test"), read_manifest(world))
    return str(caught.value)


def test_settings_that_generation_refuses(world: Path, tiny_llm: Path) -> None:
    runs = {"teacher": Path("nowhere")}
    assert "validated by HR@1, not by NDCG@10: set train.metric=HR@1" in _refused_generation(
        world, tiny_llm, "tallrec", runs, metric="NDCG@10"
    )
    assert "llm_srec does not support task=generation" in _refused_generation(world, tiny_llm, "llm_srec", runs)
    assert "set evaluation.candidates=sampled" in _refused_generation(
        world, tiny_llm, "tallrec", runs, evaluation={"candidates": "full"}
    )
    tree = llm4rec_config("tallrec", Path("d"), Path("o"), Path("m"), runs, metric="HR@1") | {"task": "generation"}
    tree["system"]["targets"] = "all"
    with pytest.raises(ConfigError, match=r"set system\.targets=last"):
        check_requirements(parse_config(tree, "test"), read_manifest(world))


def test_a_run_is_evaluated_on_the_task_it_was_trained_for(tiny_llm: Path) -> None:
    config = parse_config(llm4rec_config("tallrec", Path("d"), Path("o"), tiny_llm, {}), "test")
    with pytest.raises(ConfigError, match="trained for task=retrieval, not generation: train one with task=generation"):
        check_task(config, "generation", config.evaluation)
