"""One training step of each LLM system at the shapes of real models, on a fake CUDA device.

Memory, kernels and copies are affine in the number of layers, so that two short LLMs give those of the whole one.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
from fake_fixtures import FakeCuda
from helpers import LLM_SYSTEMS

from benchmarks.common.setting import LLMS

FEW, MORE = 2, 3
"""Layers of the two short LLMs. The first and the last layer of any LLM differ from the others."""
PLAN_ABOVE = 1.1
"""The plan may be this many times the peak, and not below it."""
HEADROOM = 1.1
"""Kernels and bytes may be this many times those of the table."""


@dataclass(frozen=True)
class Case:
    """A system around an LLM, on rank 0 of 8 with 20 users."""

    system: str
    llm: str = "Llama-3.2-3B"
    quantization: str = "none"
    deepspeed: str = "zero1"

    def run(self, fake_cuda: FakeCuda, layers: int) -> dict[str, Any]:
        words = (f"system.llm.quantization={self.quantization}", f"engine.deepspeed={self.deepspeed}")
        return fake_cuda.run(self.system, self.llm, *words, layers=layers)

    def whole(self, fake_cuda: FakeCuda, what: str) -> float:
        """This number of the whole LLM."""
        layers: int = LLMS[self.llm]["num_hidden_layers"]
        few, more = (_number(self.run(fake_cuda, some)[what]) for some in (FEW, MORE))
        return few + (more - few) / (MORE - FEW) * (layers - FEW)

    def __str__(self) -> str:
        return f"{self.system} {self.llm} {self.quantization} {self.deepspeed}"


def _number(value: Any) -> float:
    return sum(value.values()) if isinstance(value, dict) else value


SYSTEMS = [Case(system) for system in LLM_SYSTEMS]
QUANTIZED = [Case("a_llmrec", quantization="int8"), Case("llm_srec", quantization="fp8")]
"""Cases of systems without adapters, which need exact weights (`trainer/runs/requirements.py`)."""
LARGER, SHARDED = [Case("llm_srec", "Llama-3.1-8B")], [Case("llm_srec", deepspeed="zero3")]
ALL = [*SYSTEMS, *QUANTIZED, *LARGER, *SHARDED]


@pytest.mark.parametrize("case", ALL, ids=str)
def test_the_plan_is_at_most_a_tenth_above_the_peak(fake_cuda: FakeCuda, case: Case) -> None:
    peak, planned = case.whole(fake_cuda, "peak"), case.whole(fake_cuda, "planned")
    assert peak <= planned <= PLAN_ABOVE * peak, f"plan {planned / 1e9:.2f} GB, peak {peak / 1e9:.2f} GB"
    # Where the peak is must not depend on the depth, or the peak is not affine in it.
    few, more = (case.run(fake_cuda, layers)["peak_operation"] for layers in (FEW, MORE))
    assert few == more


@pytest.mark.parametrize("what", ["peak", "planned", "kernels", "copied"])
def test_costs_are_affine_in_the_number_of_layers(fake_cuda: FakeCuda, what: str) -> None:
    case = Case("llm_srec")
    two, three, five = (_number(case.run(fake_cuda, layers)[what]) for layers in (2, 3, 5))
    assert five == pytest.approx(two + 3 * (three - two), rel=1e-4)


WAITS = {"trainer/engine/rank_status.py:exchange: copy to host": 1}
"""Waits of the host for the device that a step may have, and how many of each."""


@pytest.mark.parametrize("case", SYSTEMS, ids=str)
def test_the_host_waits_only_where_it_may(fake_cuda: FakeCuda, case: Case) -> None:
    """Exactly: a wait that is gone goes from the table too."""
    assert case.run(fake_cuda, MORE)["waits"] == WAITS


@pytest.mark.parametrize("case", ALL, ids=str)
def test_no_operation_mixes_host_and_device(fake_cuda: FakeCuda, case: Case) -> None:
    """An operand on the host is an error already, an index is not."""
    assert case.run(fake_cuda, MORE)["mixed"] == {}


@pytest.mark.parametrize("case", ALL, ids=str)
def test_every_trained_parameter_gets_a_gradient_in_fp32(fake_cuda: FakeCuda, case: Case) -> None:
    found = case.run(fake_cuda, MORE)
    assert found["gradients"] == {"torch.float32 on cuda": found["parameters"]}
    assert found["parameters"] > 0


@pytest.mark.parametrize("case", ALL, ids=str)
def test_attention_is_the_variable_length_kernel(fake_cuda: FakeCuda, case: Case) -> None:
    """Once per layer and stream, and its backward pass once per layer; nothing else grows with the layers."""
    few, more = (Counter(case.run(fake_cuda, layers)["kernels"]) for layers in (FEW, MORE))
    streams = 1 if case.system in ("tallrec", "llara", "collm") else 2
    assert more["torch_attn::_varlen_attn"] == streams * MORE
    assert more["torch_attn::_varlen_attn_backward"] == MORE
    added = more - few
    assert not [name for name in added if any(part in name for part in ("scaled_dot_product", "softmax", "bmm"))]


BUDGETS = {
    "tallrec": (4_010, 1.00e6),
    "llara": (8_110, 0.92e6),
    "collm": (4_160, 0.99e6),
    "a_llmrec": (3_280, 0.99e6),
    "llm_srec": (3_390, 0.91e6),
}
"""Kernels of a step of 3B in bf16, and bytes copied to the device, as measured."""


@pytest.mark.parametrize("case", SYSTEMS, ids=str)
def test_a_step_stays_within_its_budget(fake_cuda: FakeCuda, case: Case) -> None:
    kernels, copied = BUDGETS[case.system]
    assert case.whole(fake_cuda, "kernels") <= HEADROOM * kernels
    assert case.whole(fake_cuda, "copied") <= HEADROOM * copied
