"""Bytes moved besides matrix products, and memory of the loss, against those of the real parts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import llm_srec_config
from llm_parts import retrieval_parts
from plan_helpers import LLAMA_3B, Operations, build_larger_llm
from torch import Tensor

from trainer.config import LLMConfig, LoRAConfig, parse_config
from trainer.data.prompts.packing import PackedPrompts, pack
from trainer.data.prompts.prompt import READOUT_SLOT, Prompt
from trainer.data.reading.dataset import open_dataset
from trainer.models import build_system
from trainer.models.llm.retrieval import BatchTerms
from trainer.nn import dropout
from trainer.nn.llm.backbone import FrozenLLM, load_llm
from trainer.nn.llm.lora import add_adapters
from trainer.planner.costs import Load
from trainer.planner.llm_shape import Adapters, LLMShape
from trainer.planner.overheads import Running, loss_bytes
from trainer.planner.workload import load_of_prompts


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_larger_llm(tmp_path_factory.mktemp("larger"), layers=2)


def _packed(*, frozen_prefix: bool = True) -> PackedPrompts:
    generator = np.random.default_rng(0)
    prompts = []
    for length in (150, 120, 90, 130):
        slot_S = np.array([length // 3, length - 1])
        prompts.append(Prompt(generator.integers(2, 400, length), slot_S, np.array([1, READOUT_SLOT]), slot_S[-1:]))
    return pack(prompts, frozen_prefix=frozen_prefix)


def _moved(llm: FrozenLLM, packed: PackedPrompts) -> tuple[float, float]:
    """Bytes of all operations but matrix products, forward and backward."""
    vector_SD = torch.randn(len(packed.slot_S), llm.dim, requires_grad=True)
    with Operations() as forward:
        out_RD = llm(packed, vector_SD)
    with Operations() as backward:
        out_RD.sum().backward()
    return forward.moved, backward.moved


@pytest.mark.parametrize("quantization", ["int8", "fp8"])
def test_quantization_moves_what_its_operations_move(path: Path, quantization: str) -> None:
    packed = _packed()
    exact, rounded = (
        _moved(load_llm(LLMConfig(path=str(path), dtype="bfloat16", quantization=name)), packed)
        for name in ("none", quantization)
    )
    running, load = Running(LLMShape.of_folder(path), 2, quantization), load_of_prompts(packed)
    assert rounded[0] - exact[0] == pytest.approx(running.forward_bytes(load), rel=0.03)
    assert rounded[1] - exact[1] == pytest.approx(running.backward_bytes(load), rel=0.03)


def test_the_dropout_of_adapters_moves_what_its_operations_move(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dropout, "_CHUNK", 2**30)  # all rows at once, as on an accelerator
    packed, found = _packed(frozen_prefix=False), []
    for p in (0.0, 0.1):
        llm = load_llm(LLMConfig(path=str(path), dtype="float32"))
        add_adapters(llm, LoRAConfig(dropout=p, targets=("q_proj", "down_proj"))).set(0, packed)
        found.append(_moved(llm.train(), packed))
    shape, load = LLMShape.of_folder(path), load_of_prompts(packed)
    running = Running(shape, 4, adapters=Adapters(8, ("q_proj", "down_proj"), dropout=True), fused_dropout=False)
    for without, with_dropout in zip(*found, strict=True):
        assert with_dropout - without == pytest.approx(running.dropout_bytes(load), rel=0.03)
    assert replace(running, fused_dropout=True).dropout_bytes(load) < running.dropout_bytes(load) / 16


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_the_loss_takes_the_memory_of_its_scores(weight: float, world: Path, teacher: Path, tiny_llm: Path) -> None:
    tree = llm_srec_config(world, Path("unused"), teacher, tiny_llm)
    tree["system"] |= {"train_candidates": "batch", "score_distill_weight": weight}
    model, _ = retrieval_parts(build_system(parse_config(tree, "test"), open_dataset(world, full_check=False)))
    users, targets, items, dim, own = 40, 3, 4000, 128, 16 if weight else 0

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, requires_grad=True)

    terms = BatchTerms(
        real_BW=torch.ones(users, targets),
        target_BW=torch.randint(items, (users, targets)),
        student_BWD=leaf(users, targets, dim),
        teacher_BWD=leaf(users, targets, dim),
        item_BXD=leaf(users, items // users, dim),
        log_q_BX=torch.zeros(users, items // users),
        excluded_BM=torch.zeros(users, items, dtype=torch.uint8),
        teacher_user_BWd=torch.randn(users, targets, own),
        teacher_item_BXd=torch.randn(users, items // users, own),
        targets=users * targets,
    )
    gathered = sum(term.nbytes for term in terms if isinstance(term, Tensor))
    with Operations() as counted:
        model.loss(terms).total.backward()
    rows = users * targets
    predicted = loss_bytes(
        gathered, scores=rows * items, pair_elements=rows * (rows - 1) // 2 * dim, scored_twice=weight > 0
    )
    assert counted.peak <= predicted - gathered <= 1.1 * counted.peak


def test_launches_are_those_counted_on_tensors_without_data() -> None:
    """Whole steps of a 3B model under DeepSpeed, cut to some of its layers."""
    srec, whole = Load(9367, 1184, 6844, 1, 1, 7158, 20812, 98), LLMShape.of_settings(LLAMA_3B, "3B")
    lora = replace(srec, frozen=0)
    every = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    tallrec, llara = (Adapters(8, targets, dropout=True) for targets in (("q_proj", "v_proj"), every))
    for layers, load, quantization, adapters, counted in (
        (3, srec, "none", None, 877), (6, srec, "none", None, 1180), (28, srec, "none", None, 3402),
        (3, srec, "int8", None, 1003), (3, srec, "fp8", None, 1228),
        (6, lora, "none", tallrec, 1921), (6, lora, "none", llara, 4606),
    ):  # fmt: skip
        running = Running(replace(whole, layers=layers), 2, quantization, adapters, fused_dropout=False)
        found = running.forward_launches(load) + running.backward_launches() + running.step_launches()
        assert found == pytest.approx(counted, rel=0.07)
