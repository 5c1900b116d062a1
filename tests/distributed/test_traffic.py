"""The traffic table of `ds_configs/README.md`, against the bytes that real runs send.

Letters, in bytes: A trained parts, W layers of the LLM and last norm, E its token table, T teacher; m micro-batches.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import llm_srec_config, write_config
from safetensors.numpy import load_file

from benchmarks.wire import count_steps
from trainer.config import LLMSRecConfig, load_config
from trainer.config.runs import RunFolder
from trainer.reports.llm_shape import LLMShape
from trainer.reports.trained import trained_parameters

pytestmark = pytest.mark.distributed

USERS, FP32 = 12, 4
TERMS = 1 + 4 + 2 * 16
"""Numbers that ranks gather of a user: scores of the next item and of four others, two projections."""
VITALS = 5
NOTHING_KEPT = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}
"""ZeRO-3 as with a model far larger than what DeepSpeed keeps or fetches ahead."""


def preset_of(folder: Path, world: Path, teacher: Path, llm: Path, *, ranks: int, stage: int, m: int) -> Path:
    settings = folder / "ds.json"
    settings.write_text(json.dumps({"zero_optimization": {"stage": stage, **(NOTHING_KEPT if stage == 3 else {})}}))
    config = llm_srec_config(world, folder / "run", teacher, llm, batch_size=USERS, validate_every=1)
    config["engine"] |= {"deepspeed": str(settings)}
    config["train"] |= {"micro_batch_size": USERS // ranks // m}
    return write_config(folder / "preset.yaml", config)


def table(A: int, W: int, E: int, T: int, items: int, *, stage: int, m: int) -> dict[str, int]:
    """What goes around the ring, by collective; `items` is the teacher's item table, which is read twice."""
    if stage < 3:
        reduced = 2 * A * (m if stage == 2 else 1)
        return {"allreduce_": reduced, "_allgather_base_": A if stage else 0, "_reduce_scatter_base_": 0}
    forwards = 1 if m == 1 else 2 * m
    weights = (2 * forwards + m) * W + 2 * forwards * E + (forwards + m) * A + forwards * (T + items)
    return {"allreduce_": 0, "_allgather_base_": weights, "_reduce_scatter_base_": m * A}


@pytest.mark.parametrize(
    ("ranks", "stage", "m"), [(2, 0, 1), (2, 0, 2), (2, 1, 2), (2, 2, 2), (2, 3, 1), (2, 3, 2), (4, 1, 1), (4, 3, 1)]
)
def test_a_step_sends_what_the_table_says(
    tmp_path: Path, world: Path, teacher: Path, tiny_llm: Path, ranks: int, stage: int, m: int
) -> None:
    preset = preset_of(tmp_path, world, teacher, tiny_llm, ranks=ranks, stage=stage, m=m)
    system = load_config(preset, []).system
    assert isinstance(system, LLMSRecConfig)
    shape, run = LLMShape.of_folder(tiny_llm), RunFolder(teacher)
    of_teacher = load_file(run.step_path(run.best().progress.step) / "weights.safetensors")
    tokens = shape.vocabulary * shape.width * FP32
    whole = table(
        FP32 * trained_parameters(system, shape, teacher_dim=16, item_dim=16),
        shape.weight_bytes(FP32, int8=False) - tokens,
        tokens,
        sum(tensor.nbytes for tensor in of_teacher.values()),
        of_teacher["items.weight"].nbytes,
        stage=stage,
        m=m,
    ) | {"allgather_": FP32 * (USERS * TERMS + ranks * VITALS)}

    # The first steps set things up.
    sent = count_steps(tmp_path / "ranks", [str(preset)], ranks=ranks, steps=3)[-1]["sent"]
    for name, size in whole.items():  # the norm of the gradient, one or two numbers, is not in the table
        assert sent.pop(name, 0) == pytest.approx(size * (ranks - 1) / ranks, abs=16), name
    assert not sent
