"""Ranks of fake worlds of many: their collectives are equal, and ZeRO-3 never has a whole large model on a device."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from fake_fixtures import FakeCuda

from benchmarks.common.setting import LLMS
from trainer.planner.llm_shape import LLMShape


@pytest.mark.parametrize(("ranks", "stage"), [(8, 1), (64, 1), (16, 2), (8, 3)])
def test_all_ranks_call_the_same_collectives(fake_cuda: FakeCuda, ranks: int, stage: int) -> None:
    """In kind, order, shapes and dtypes, although the last ranks have a user less than the first, and other prompts."""
    first, last = (_rank(fake_cuda, rank, ranks, stage) for rank in (0, ranks - 1))
    assert first["collectives"], "nothing was recorded"
    assert first["initialize"]["collectives"] == last["initialize"]["collectives"]
    assert first["collectives"] == last["collectives"]
    assert first["copied"] != last["copied"], "their batches must differ"


def test_each_stage_exchanges_what_it_should(fake_cuda: FakeCuda) -> None:
    """ZeRO-1 reduces all gradients and gathers the updated parameters; ZeRO-3 scatters, and gathers each weight."""
    one, three = (Counter(call[0] for call in _rank(fake_cuda, 0, 8, stage)["collectives"]) for stage in (1, 3))
    assert one == {"c10d::allgather_": 5, "c10d::allreduce_": 1, "c10d::_allgather_base_": 1}
    assert three["c10d::_reduce_scatter_base_"] == 1
    assert three["c10d::_allgather_base_"] > 100


def _rank(fake_cuda: FakeCuda, rank: int, ranks: int, stage: int) -> dict[str, Any]:
    """A step of LLM-SRec, of 2 users per rank and of 1 on the last three."""
    return fake_cuda.run(
        "llm_srec", "tiny", f"engine.deepspeed=zero{stage}", layers=1, rank=rank, ranks=ranks, users=2 * ranks - 3
    )


def test_zero_3_starts_70b_within_a_share_of_its_weights(fake_cuda: FakeCuda) -> None:
    """18.0 GB on each of 8 ranks; DeepSpeed alone would put 140 GB on each first."""
    name, ranks, few, more = "Llama-3.1-70B", 8, 12, 16  # with fewer, the token table alone is the peak
    peaks = [
        fake_cuda.run("llm_srec", name, "engine.deepspeed=a6000/zero3", layers=layers, steps=0)["initialize"]["peak"]
        for layers in (few, more)
    ]
    layers: int = LLMS[name]["num_hidden_layers"]
    peak = peaks[0] + (peaks[1] - peaks[0]) / (more - few) * (layers - few)
    shape = LLMShape.of_settings(LLMS[name], name)
    share, largest = 2 * shape.parameters / ranks, 2 * shape.vocabulary * shape.width
    assert share < peak < share + 1.2 * largest
    assert peak < 20e9
