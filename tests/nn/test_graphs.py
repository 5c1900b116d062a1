"""Decoder layers as graphs, the purpose of packing=rows: traced by torch.compile as on a Gaudi, then run op by op."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import build_llm
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from trainer.config import LLMConfig
from trainer.data.prompts.packing import PackedPrompts
from trainer.data.prompts.prompt import READOUT_SLOT, Prompt
from trainer.data.prompts.row_packing import pack_rows
from trainer.nn.llm import backbone
from trainer.nn.llm.backbone import FrozenLLM, load_llm

ROW = 64


@pytest.fixture(scope="module")
def five_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_llm(tmp_path_factory.mktemp("llm"), layers=5)


def batch(prompts: int, seed: int) -> PackedPrompts:
    """Prompts of many lengths, each with two slots and a read-out."""
    generator = np.random.default_rng(seed)
    made = []
    for _ in range(prompts):
        length = int(generator.integers(8, ROW))
        token_T, slot_S = generator.integers(0, 400, length), np.array([2, length - 1])
        made.append(Prompt(token_T, slot_S, np.array([1, READOUT_SLOT]), slot_S[-1:]))
    return pack_rows(made, ROW)


def num_rows(packed: PackedPrompts) -> int:
    return len(packed.trained.token_T) // ROW


def hidden_and_gradient(llm: FrozenLLM, packed: PackedPrompts) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    vector_SD = torch.randn(len(packed.slot_S), llm.dim, generator=generator).requires_grad_()
    hidden_PD = llm(packed, vector_SD)
    (gradient_SD,) = torch.autograd.grad(hidden_PD.square().sum(), vector_SD)
    return hidden_PD.detach(), gradient_SD


def test_batches_have_few_numbers_of_rows() -> None:
    rows = {num_rows(batch(60, seed)) for seed in range(40)}
    assert rows <= {28, 32, 40, 48}
    assert len(rows) <= 3


@pytest.mark.parametrize("recompute", [False, True])
def test_a_graph_serves_all_layers_and_steps(
    five_layers: Path, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All layers but the last are graphs: the first, which makes the mask, and the others share one for each number of
    rows."""
    torch._dynamo.reset()
    config = LLMConfig(path=str(five_layers), dtype="float32", packing="rows", recompute=recompute)
    plain = load_llm(config)
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(backbone, "graph_backend", lambda: counter)
    compiled = load_llm(config)
    batches = [batch(6, seed) for seed in range(4)]
    for packed in batches:
        ours, theirs = (hidden_and_gradient(llm, packed) for llm in (compiled, plain))
        for value, expected in zip(ours, theirs, strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 2 * len({num_rows(packed) for packed in batches})
