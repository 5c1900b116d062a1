"""The formulas of `trainer/planner/traffic.py` against the bytes and calls of real runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import llm4rec_config, write_config
from safetensors.numpy import load_file

from benchmarks.cluster.wire import count_steps
from trainer.config import LLM4RecConfig, LLMSRecConfig, load_config
from trainer.planner.llm_shape import LLMShape
from trainer.planner.traffic import Parts, step_traffic, term_rings
from trainer.planner.trainable_params import adapters_of, trained_parameters
from trainer.runs.folder import RunFolder

USERS, FP32 = 12, 4
NOTHING_KEPT = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}
"""ZeRO-3 as for a model far larger than what DeepSpeed keeps or prefetches."""


def counted(
    folder: Path, config: dict[str, Any], *, ranks: int, stage: int, m: int, node: int = 1, **llm: Any
) -> tuple[LLM4RecConfig, dict[str, Any]]:
    """The system, and what a rank sends in the last of three steps; the first ones set things up.

    Args:
        node: ranks that keep a copy of all weights together under ZeRO-3; 1: none do.
    """
    settings = folder / "ds.json"
    zero3 = NOTHING_KEPT | {"zero_hpz_partition_size": node} if stage == 3 else {}
    settings.write_text(json.dumps({"zero_optimization": {"stage": stage, **zero3}}))
    config["engine"] |= {"deepspeed": str(settings)}
    config["train"] |= {"micro_batch_size": USERS // ranks // m}
    config["system"]["llm"] |= llm
    preset = write_config(folder / "preset.yaml", config)
    system = load_config(preset, []).system
    assert isinstance(system, LLM4RecConfig)
    return system, count_steps(folder / "ranks", [str(preset)], ranks=ranks, steps=3)[-1]


def parts_of(system: LLM4RecConfig, llm: Path, **teacher: int) -> Parts:
    """Sizes in fp32 of what one rank holds unsplit."""
    shape = LLMShape.of_folder(llm)
    trained = trained_parameters(system, shape, teacher_dim=16, item_dim=16)
    return Parts.of(shape, FP32, trained, adapters_of(system), system=system, **teacher)


def teacher_bytes(teacher: Path) -> tuple[int, int]:
    """Bytes of all weights, and of the item table."""
    run = RunFolder(teacher)
    weights = load_file(run.step_path(run.best().progress.step) / "weights.safetensors")
    return sum(tensor.nbytes for tensor in weights.values()), weights["items.weight"].nbytes


@pytest.mark.parametrize(
    ("ranks", "stage", "m", "more"),
    [
        (2, 0, 2, {}),
        (2, 1, 2, {}),
        (2, 2, 2, {}),
        (2, 3, 1, {}),
        (2, 3, 2, {}),
        (2, 3, 1, {"packing": "rows"}),
        (2, 3, 2, {"recompute": True}),
        (4, 3, 3, {"node": 2}),
    ],
)
def test_a_step_sends_what_the_formulas_predict(
    tmp_path: Path, world: Path, teacher: Path, tiny_llm: Path, ranks: int, stage: int, m: int, more: dict[str, Any]
) -> None:
    config = llm4rec_config(
        "llm_srec", world, tmp_path / "run", tiny_llm, {"teacher": teacher}, batch_size=USERS, validate_every=1
    )
    system, found = counted(tmp_path, config, ranks=ranks, stage=stage, m=m, **more)
    assert isinstance(system, LLMSRecConfig)
    # The teacher's item table is read for its user vectors and for the slots.
    parts = parts_of(system, tiny_llm, teacher=sum(teacher_bytes(teacher)))
    traffic = step_traffic(
        parts,
        zero_stage=stage,
        micro_batches=m,
        streams=1 if system.llm.packing == "rows" else 2,
        recompute=system.llm.recompute,
    )
    terms, share = term_rings(system, USERS, ranks), (ranks - 1) / ranks
    node = more.get("node", ranks)
    sent = {
        "allreduce_": 2 * traffic.reduced.whole * share,
        "_allgather_base_": traffic.gathered.whole * share + traffic.repeated.whole * (node - 1) / node,
        "_reduce_scatter_base_": traffic.scattered.whole * share,
        "allgather_": terms.whole * share,
    }
    calls = {
        "allreduce_": traffic.reduced.calls,
        "_allgather_base_": traffic.gathered.calls + traffic.repeated.calls,
        "_reduce_scatter_base_": traffic.scattered.calls,
        "allgather_": terms.calls,
    }
    assert found["calls"] == {operator: count for operator, count in calls.items() if count}
    for operator, size in found["sent"].items():
        # The formulas leave out the gradient norm, one or two numbers.
        assert size == pytest.approx(sent.pop(operator), abs=16), operator
    assert not any(sent.values())
    if node == ranks:
        assert traffic.sent(ranks) + terms.whole * share == pytest.approx(sum(found["sent"].values()), abs=16)


def test_with_adapters_the_layers_run_once_per_pass(tmp_path: Path, world: Path, teacher: Path, tiny_llm: Path) -> None:
    """LLaRA under ZeRO-3 reads only the item vectors of its teacher. The formulas leave out the terms of its loss."""
    config = llm4rec_config(
        "llara", world, tmp_path / "run", tiny_llm, {"teacher": teacher}, batch_size=USERS, validate_every=1
    )
    system, found = counted(tmp_path, config, ranks=2, stage=3, m=1)
    traffic = step_traffic(
        parts_of(system, tiny_llm, teacher=teacher_bytes(teacher)[1]), zero_stage=3, micro_batches=1, streams=1
    )
    sent = found["sent"]
    assert sent["_allgather_base_"] == pytest.approx((traffic.gathered.whole + traffic.repeated.whole) / 2, abs=16)
    assert sent["_reduce_scatter_base_"] == pytest.approx(traffic.scattered.whole / 2, abs=16)


@pytest.mark.parametrize(
    ("stage", "more"), [(1, {}), (3, {"score_distill_weight": 0.5, "user_vector": "end"})], ids=["plain", "scores"]
)
def test_terms_of_items_of_the_batch(
    tmp_path: Path, world: Path, teacher: Path, tiny_llm: Path, stage: int, more: dict[str, Any]
) -> None:
    """Distilled scores gather the teacher's vectors of users and items, and under ZeRO-3 read its item table again."""
    config = llm4rec_config(
        "llm_srec", world, tmp_path / "run", tiny_llm, {"teacher": teacher}, batch_size=USERS, validate_every=1
    )
    # So many negatives that every item of the catalog is in every batch.
    config["system"] |= {"train_candidates": "batch", "batch_negatives": 20} | more
    system, found = counted(tmp_path, config, ranks=2, stage=stage, m=1)
    assert isinstance(system, LLMSRecConfig)
    terms = term_rings(system, USERS, 2, items=40, teacher_dim=16)
    weights, table = teacher_bytes(teacher)
    parts = parts_of(system, tiny_llm, teacher=weights + (1 + (stage == 3)) * table)
    traffic = replace(step_traffic(parts, zero_stage=stage, micro_batches=1), terms=terms)
    assert found["calls"]["allgather_"] == terms.calls
    assert found["sent"]["allgather_"] == pytest.approx(terms.whole / 2, abs=16)
    assert found["calls"]["_allgather_base_"] == traffic.gathered.calls + traffic.repeated.calls
    assert sum(found["sent"].values()) == pytest.approx(traffic.sent(2), abs=16)
