"""Costs counted from a shape equal those of the real model: parameters, executed FLOPs, saved activations."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from plan_helpers import LLAMA_3B, build_larger_llm

from benchmarks.common.machine import executed_flops
from trainer.config import LLMConfig, LoRAConfig
from trainer.data.prompts.packing import PackedPrompts, pack
from trainer.data.prompts.prompt import READOUT_SLOT, Prompt
from trainer.data.prompts.row_packing import pack_rows
from trainer.nn.llm.backbone import FrozenLLM, load_llm
from trainer.nn.llm.lora import add_adapters
from trainer.planner.costs import (
    Load,
    backward_flops,
    forward_flops,
    rank_bytes,
    recompute_flops,
    recomputed_bytes,
    saved_bytes,
    useful_step_flops,
)
from trainer.planner.llm_shape import Adapters, LLMShape
from trainer.planner.workload import load_of_prompts

MIXTRAL = {
    "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000, "num_local_experts": 8,
    "num_experts_per_tok": 2, "tie_word_embeddings": False,
}  # fmt: skip
QWEN3_30B = {
    "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
    "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
    "vocab_size": 151936, "num_experts": 128, "num_experts_per_tok": 8, "decoder_sparse_step": 1,
    "mlp_only_layers": [], "tie_word_embeddings": False,
}  # fmt: skip
SMOLLM2 = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49152,
}  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma"])
def test_parameters_are_those_of_the_real_model(tmp_path: Path, family: str) -> None:
    llm = load_llm(LLMConfig(path=str(build_larger_llm(tmp_path, family=family)), dtype="float32"))
    assert LLMShape.of_folder(tmp_path).parameters == sum(p.numel() for p in llm.parameters())
    cut = load_llm(LLMConfig(path=str(tmp_path), dtype="float32", layers=2))
    assert LLMShape.of_folder(tmp_path, layers=2).parameters == sum(p.numel() for p in cut.parameters())


EXPERTS = {
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen2_moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128,
                  "shared_expert_intermediate_size": 320},
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 2},
}  # fmt: skip


@pytest.mark.parametrize("family", EXPERTS)
def test_mixtures_of_experts_hold_all_and_run_some(tmp_path: Path, family: str) -> None:
    llm = load_llm(LLMConfig(path=str(build_larger_llm(tmp_path, family=family, **EXPERTS[family])), dtype="float32"))
    shape, packed = LLMShape.of_folder(tmp_path), _packed("stream")
    assert shape.parameters == sum(p.numel() for p in llm.parameters())
    vector_SD = torch.randn(len(packed.slot_S), llm.dim, requires_grad=True)
    llm.decoder.config._experts_implementation = "eager"  # torch does not count grouped products
    forward = executed_flops(lambda: llm(packed, vector_SD))
    assert forward_flops(shape, load_of_prompts(packed)) == pytest.approx(forward, rel=0.03)
    assert saved_bytes(shape, load_of_prompts(packed), 4) == pytest.approx(_kept_by_autograd(llm, packed), rel=0.25)


def test_mixtures_of_published_sizes() -> None:
    """Mixtral 8x7B: 46.7 G weights, 12.9 G of them active; Qwen3-30B-A3B: 30.5 and 3.3; with both token tables."""
    mixtral = LLMShape.of_settings(MIXTRAL, "Mixtral", with_head=True)
    assert mixtral.parameters == pytest.approx(46.7e9, rel=2e-3)
    assert mixtral.parameters - 32 * mixtral.idle_parameters == pytest.approx(12.9e9, rel=2e-3)
    qwen3 = LLMShape.of_settings(QWEN3_30B, "Qwen3", with_head=True)
    assert qwen3.parameters == pytest.approx(30.53e9, rel=1e-3)
    assert qwen3.parameters - 48 * qwen3.idle_parameters == pytest.approx(3.35e9, rel=1e-2)
    assert qwen3.weight_bytes(2, one_byte=False) == pytest.approx(61e9, rel=2e-3)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"model_type": "deepseek_v3", "n_routed_experts": 256},
            "mixture of experts .'deepseek_v3'., of which only",
        ),
        ({"model_type": "granitemoe", "num_local_experts": 40}, "of a mixture of experts .'granitemoe'."),
        ({"model_type": "minicpm3", "kv_lora_rank": 256}, "kv_lora_rank .latent attention., which cannot be planned"),
        ({"model_type": "qwen3_moe", "num_experts": 8, "mlp_only_layers": [0]}, "has layers without experts among"),
        (
            {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": "two"},
            "lacks the number of",
        ),
    ],
)
def test_mixtures_that_are_not_counted_are_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LLMShape.of_settings(LLAMA_3B | settings, "config.json")


def test_parameters_of_published_models() -> None:
    """SmolLM2-135M holds 134,515,008 weights (tied head); spec: the body of the 3B model is 2.819 G."""
    assert LLMShape.of_settings(SMOLLM2, "SmolLM2").parameters == 134_515_008
    assert LLMShape.of_settings(LLAMA_3B, "3B").matmul_parameters == pytest.approx(2.819e9, rel=1e-3)


def _prompts() -> list[Prompt]:
    """Long prompts with an early slot and short ones with a late one, all with the same first words."""
    generator = np.random.default_rng(0)
    instruction = generator.integers(2, 400, 12)
    prompts = []
    for length in [150, 120, 130, 60, 50, 45, 40, 44, 52]:
        tokens = np.concatenate([instruction, generator.integers(2, 400, length)])
        slot_S = np.array([length // 3 if length > 100 else length - 5, len(tokens) - 1])
        prompts.append(Prompt(tokens, slot_S, np.array([1, READOUT_SLOT]), slot_S[-1:]))
    return prompts


def _packed(way: str) -> PackedPrompts:
    if way == "rows":
        return pack_rows(_prompts(), 256)
    return pack(_prompts(), frozen_prefix=way == "stream")


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> tuple[FrozenLLM, LLMShape]:
    folder = build_larger_llm(tmp_path_factory.mktemp("larger"))
    return load_llm(LLMConfig(path=str(folder), dtype="float32")), LLMShape.of_folder(folder)


@pytest.fixture(scope="module", params=[("q_proj", "v_proj"), ("q_proj", "k_proj", "o_proj", "up_proj", "down_proj")])
def adapted(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> tuple[FrozenLLM, LLMShape, Adapters, PackedPrompts]:
    """An LLM with adapters in training mode, and the prompts that their dropout is set up for."""
    folder = build_larger_llm(tmp_path_factory.mktemp("adapted"))
    model, packed = load_llm(LLMConfig(path=str(folder), dtype="float32")), _packed("all trained")
    address = add_adapters(model, LoRAConfig(rank=16, targets=request.param, dropout=0.1))
    address.set(0, packed)
    return model.train(), LLMShape.of_folder(folder), Adapters(16, request.param, dropout=True), packed


WAYS = pytest.mark.parametrize("way", ["stream", "all trained", "rows"])


@WAYS
def test_flops_are_those_that_torch_counts(llm: tuple[FrozenLLM, LLMShape], way: str) -> None:
    model, shape = llm
    packed = _packed(way)
    load = load_of_prompts(packed)
    vector_SD = torch.randn(len(packed.slot_S), model.dim, requires_grad=True)
    forward = executed_flops(lambda: model(packed, vector_SD))
    both = executed_flops(lambda: torch.autograd.backward(model(packed, vector_SD).sum()))
    assert forward_flops(shape, load) == pytest.approx(forward, rel=0.02)
    assert backward_flops(shape, load) == pytest.approx(both - forward, rel=0.02)


@WAYS
def test_saved_activations_are_those_that_autograd_keeps(llm: tuple[FrozenLLM, LLMShape], way: str) -> None:
    model, shape = llm
    packed = _packed(way)
    assert saved_bytes(shape, load_of_prompts(packed), 4) == pytest.approx(_kept_by_autograd(model, packed), rel=0.05)


@pytest.mark.parametrize("quantization", ["int8", "fp8"])
def test_quantized_layers_keep_no_more_than_exact_ones(tmp_path: Path, quantization: str) -> None:
    dtype = "bfloat16"  # as fp8 computes; attention on a CPU keeps fp32 copies, in all of them
    path, packed = str(build_larger_llm(tmp_path)), _packed("stream")
    exact, quantized = (
        _kept_by_autograd(load_llm(LLMConfig(path=path, dtype=dtype, quantization=name)), packed)
        for name in ("none", quantization)
    )
    assert quantized <= exact


def test_adapters_cost_what_torch_counts_and_autograd_keeps(
    adapted: tuple[FrozenLLM, LLMShape, Adapters, PackedPrompts],
) -> None:
    model, shape, adapters, packed = adapted
    load = load_of_prompts(packed)
    assert adapters.parameters(shape) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    vector_SD = torch.randn(len(packed.slot_S), model.dim, requires_grad=True)
    forward = executed_flops(lambda: model(packed, vector_SD))
    both = executed_flops(lambda: torch.autograd.backward(model(packed, vector_SD).sum()))
    # Adapters add a few percent of the total; what they add is checked on its own.
    added = forward_flops(shape, load, adapters) - forward_flops(shape, load)
    assert forward_flops(shape, load, adapters) == pytest.approx(forward, abs=0.1 * added)
    assert backward_flops(shape, load, adapters) == pytest.approx(both - forward, abs=0.1 * added)
    assert saved_bytes(shape, load, 4, adapters) == pytest.approx(_kept_by_autograd(model, packed), rel=0.05)


@WAYS
def test_recomputation_costs_what_torch_counts(llm: tuple[FrozenLLM, LLMShape], way: str, tmp_path: Path) -> None:
    _, shape = llm
    model = load_llm(LLMConfig(path=str(build_larger_llm(tmp_path)), dtype="float32", recompute=True))
    packed = _packed(way)
    load = load_of_prompts(packed)
    vector_SD = torch.randn(len(packed.slot_S), model.dim, requires_grad=True)
    forward = executed_flops(lambda: model(packed, vector_SD))
    both = executed_flops(lambda: torch.autograd.backward(model(packed, vector_SD).sum()))
    estimated = recompute_flops(shape, load) + backward_flops(shape, load)
    assert estimated == pytest.approx(both - forward, rel=0.02)
    assert recomputed_bytes(shape, load, 4) < saved_bytes(shape, load, 4) / 2


def _kept_by_autograd(model: FrozenLLM, packed: PackedPrompts) -> int:
    """Bytes that autograd saves in a forward pass, without the weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}  # holds them, so that no address is used twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in weights:
            kept.setdefault(address, tensor)
        return tensor

    vector_SD = torch.randn(len(packed.slot_S), model.dim, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model(packed, vector_SD)
    assert out.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_weights_of_one_byte_by_hand() -> None:
    shape = LLMShape(width=4, layers=1, heads=2, kv_heads=1, head_dim=2, intermediate=8, vocabulary=10)
    matrices, rows = 4 * 4 + 2 * 4 + 2 * 4 + 4 * 4 + 3 * 8 * 4, 4 + 2 + 2 + 4 + 8 + 8 + 4
    rest = 10 * 4 + 3 * 4  # token table, three norms
    assert shape.weight_bytes(2, one_byte=False) == 2 * (matrices + rest)
    assert shape.weight_bytes(2, one_byte=True) == matrices + 4 * rows + 2 * rest


def test_a_quantized_matrix_is_unpacked_for_a_pass() -> None:
    shape, load = LLMShape.of_settings(LLAMA_3B, "3B"), Load(9000, 2500, 6600, 10, 10, 6600, 9000, 160)
    exact, rounded = (
        rank_bytes(shape, load, element=2, trained_parameters=10**7, zero_stage=1, devices=1, one_byte=one_byte)
        for one_byte in (False, True)
    )
    assert rounded.workspace - exact.workspace == 2 * 3072 * 8192
    assert rounded.total < exact.total


def test_useful_flops_by_hand() -> None:
    shape = LLMShape(width=4, layers=2, heads=2, kv_heads=1, head_dim=2, intermediate=8, vocabulary=10)
    weights = 2 * (4 * 4 + 2 * 4 + 2 * 4 + 4 * 4 + 3 * 8 * 4)
    pairs = (1 + 2 + 3) + (1 + 2)  # for prompts of three and of two tokens
    attention = pairs * 2 * (2 * 4 * 2)  # scores and mix, two FLOPs per multiply-add over 4 dimensions, 2 layers
    assert useful_step_flops(shape, [3, 2]) == 4 * weights * 5 + 3 * attention


def test_what_each_zero_stage_splits() -> None:
    shape = LLMShape.of_settings(SMOLLM2, "SmolLM2")
    load = Load(100, 50, 50, 10, 10, 50, 50, 5)

    def trained(stage: int, devices: int) -> int:
        found = rank_bytes(shape, load, element=2, trained_parameters=1000, zero_stage=stage, devices=devices)
        return found.trained

    assert [trained(stage, 4) for stage in range(4)] == [16_000, 11_000, 8_000, 4_000]
    whole = rank_bytes(shape, load, element=2, trained_parameters=0, zero_stage=1, devices=4)
    split = rank_bytes(shape, load, element=2, trained_parameters=0, zero_stage=3, devices=4)
    assert whole.frozen_weights == 2 * shape.parameters
    assert shape.parameters / 2 < split.frozen_weights < whole.frozen_weights / 2


def test_a_config_that_cannot_be_planned_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json does not exist"):
        LLMShape.of_folder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        LLMShape.of_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_embd": 8}))
    with pytest.raises(ValueError, match="has no hidden_size"):
        LLMShape.of_folder(tmp_path)


def test_a_config_that_is_no_object_is_named(tmp_path: Path) -> None:
    for content, message in (("[]", "not a JSON object"), ("[" * 100_000, "not valid JSON: nested too deeply")):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=rf"config\.json is {message}"):
            LLMShape.of_folder(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("num_attention_heads", 0, "0"),
        ("num_hidden_layers", -3, "-3"),
        ("hidden_size", 10**400, "1" + "0" * 29),
        ("head_dim", "x", "x"),
        ("num_key_value_heads", [1], "[1]"),
    ],
)
def test_a_size_that_is_none_is_named(tmp_path: Path, key: str, value: object, shown: str) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(sizes | {"vocab_size": 9, key: value}))
    with pytest.raises(ValueError, match=re.escape(f"config.json has {key}={shown}: correct it")):
        LLMShape.of_folder(tmp_path)
