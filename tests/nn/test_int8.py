"""Linear layers with int8 weights: close to unquantized ones, and independent of the batch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import build_llm
from torch import Tensor, nn

from trainer.config import LLMConfig
from trainer.data.prompts.packing import pack
from trainer.data.prompts.prompt import READOUT_SLOT, Prompt
from trainer.nn.llm.backbone import FrozenLLM, check_llm, load_llm
from trainer.nn.llm.int8 import Int8Linear
from trainer.nn.pretrained import LLMError
from trainer.planner.llm_shape import LLMShape

LENGTHS = (40, 31, 26, 9)


def _llm(path: Path, quantization: str = "int8", dtype: str = "float32", **options: object) -> FrozenLLM:
    return load_llm(LLMConfig(path=str(path), quantization=quantization, dtype=dtype, **options))


def _prompts() -> list[Prompt]:
    rng = np.random.default_rng(1)
    prompts = []
    for length in LENGTHS:
        end = np.array([length - 1])
        slots = np.array([length // 2, length - 1])
        prompts.append(Prompt(rng.integers(2, 400, length), slots, np.array([1, READOUT_SLOT]), end))
    return prompts


def _vectors() -> Tensor:
    return torch.randn(2 * len(LENGTHS), 32, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_values_and_gradients_are_close_to_unquantized_ones(tmp_path: Path, family: str, recompute: bool) -> None:
    """Qwen2 is among the families because its linear layers have biases."""
    path, found = build_llm(tmp_path, family=family), []
    vector_SD = _vectors().requires_grad_()
    weight_PD = torch.randn(len(LENGTHS), 32, generator=torch.Generator().manual_seed(3))
    for quantization in ("none", "int8"):
        hidden_PD = _llm(path, quantization, recompute=recompute)(pack(_prompts()), vector_SD)
        found.append((hidden_PD.detach(), *torch.autograd.grad((hidden_PD * weight_PD).sum(), vector_SD)))
    for exact, rounded in zip(*found, strict=True):
        assert 0.999 < float(torch.cosine_similarity(exact.flatten(), rounded.flatten(), dim=0)) < 1.0 - 1e-7


def test_a_prompt_alone_is_read_as_when_it_is_packed(tiny_llm: Path) -> None:
    """Some tokens have large features, as in a real LLM, which LLM.int8() would not round in the whole pass."""
    llm, prompts, vector_SD = _llm(tiny_llm), _prompts(), _vectors()
    for name, norm_D in llm.named_parameters():
        if "layernorm" in name:
            norm_D.mul_(4)
    packed_PD = llm(pack(prompts), vector_SD)
    alone = [llm(pack([prompt]), vector_SD[2 * index :][:2]) for index, prompt in enumerate(prompts)]
    torch.testing.assert_close(packed_PD, torch.cat(alone), rtol=0, atol=5e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_is_its_rounded_weights(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 48, dtype=dtype)
    with torch.no_grad():
        linear.weight[5] *= 1000  # must not coarsen the other channels
        linear.weight[7] = 0
    layer = Int8Linear(linear)
    buffers = dict(layer.named_buffers())
    assert buffers["weight_OI"].dtype == torch.int8
    assert buffers["weight_OI"].abs().amax(1).tolist() == [0 if row == 7 else 127 for row in range(48)]
    weight_OI = buffers["weight_OI"].double() * buffers["scale_O"][:, None]
    half_step_O1 = linear.weight.double().abs().amax(1, keepdim=True) / 127 / 2
    assert torch.all((weight_OI - linear.weight.double()).abs() <= half_step_O1 * 1.001)
    x = torch.randn(2, 9, 64, dtype=dtype, requires_grad=True)
    y, grad = layer(x), torch.randn(2, 9, 48, dtype=dtype)
    (found,) = torch.autograd.grad(y, x, grad)
    assert (y.dtype, found.dtype) == (dtype, dtype)
    rtol, atol = (1e-5, 1e-4) if dtype == torch.float32 else (0.02, 0.05)
    torch.testing.assert_close(y.double(), x.double() @ weight_OI.T + linear.bias.double(), rtol=rtol, atol=atol)
    torch.testing.assert_close(found.double() / 1000, grad.double() @ weight_OI / 1000, rtol=rtol, atol=atol)
    assert layer(x[:, :0]).shape == (2, 0, 48)


def test_a_weight_takes_one_byte_and_is_not_a_parameter(tiny_llm: Path) -> None:
    decoder = _llm(tiny_llm, dtype="bfloat16").decoder
    layers = [module for module in decoder.modules() if isinstance(module, Int8Linear)]
    assert len(layers) == 3 * 7
    assert not any(isinstance(module, nn.Linear) for module in decoder.modules())
    tensors = [*decoder.parameters(), *(buffer for layer in layers for buffer in layer.buffers())]
    assert not any(tensor.requires_grad for tensor in tensors)
    shape = LLMShape.of_folder(tiny_llm)
    assert sum(tensor.nbytes for tensor in tensors) == shape.weight_bytes(2, one_byte=True)


def test_weights_that_are_quantized_already_are_refused(tmp_path: Path, with_bitsandbytes: None) -> None:
    path = build_llm(tmp_path)
    settings = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(settings | {"quantization_config": {"quant_method": "bitsandbytes"}}))
    with pytest.raises(LLMError, match="int8 cannot round weights that are quantized already: set system"):
        check_llm(LLMConfig(path=str(path), quantization="int8"))
