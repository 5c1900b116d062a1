"""Linear layers in fp8: close to those in bf16, one byte per weight, one scale per token."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import build_llm
from torch import nn

from trainer.config import LLMConfig
from trainer.data.prompts.packing import pack
from trainer.data.prompts.prompt import READOUT_SLOT, Prompt
from trainer.nn.llm import fp8
from trainer.nn.llm.backbone import FrozenLLM, check_llm, load_llm
from trainer.nn.llm.fp8 import Float8Linear
from trainer.nn.pretrained import LLMError
from trainer.planner.llm_shape import LLMShape


def _llm(path: Path, quantization: str, **options: object) -> FrozenLLM:
    return load_llm(LLMConfig(path=str(path), quantization=quantization, **options))


def _prompts() -> list[Prompt]:
    rng = np.random.default_rng(1)
    prompts = []
    for length in (40, 31, 26, 9):
        end = np.array([length - 1])
        slots = np.array([length // 2, length - 1])
        prompts.append(Prompt(rng.integers(2, 400, length), slots, np.array([1, READOUT_SLOT]), end))
    return prompts


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_values_and_gradients_are_close_to_those_in_bf16(tmp_path: Path, family: str, recompute: bool) -> None:
    """Qwen2 is among the families because its linear layers have biases."""
    path, found = build_llm(tmp_path, family=family), []
    vector_SD = torch.randn(8, 32, generator=torch.Generator().manual_seed(2)).requires_grad_()
    weight_PD = torch.randn(4, 32, generator=torch.Generator().manual_seed(3))
    for quantization in ("none", "fp8", "fp8"):
        hidden_PD = _llm(path, quantization, recompute=recompute)(pack(_prompts()), vector_SD)
        found.append((hidden_PD.detach(), *torch.autograd.grad((hidden_PD * weight_PD).sum(), vector_SD)))
    for exact, rounded, again in zip(*found, strict=True):
        assert 0.99 < float(torch.cosine_similarity(exact.flatten(), rounded.flatten(), dim=0)) < 1.0 - 1e-5
        assert torch.equal(rounded, again)


def test_a_weight_takes_one_byte_and_is_not_a_parameter(tiny_llm: Path) -> None:
    decoder = _llm(tiny_llm, "fp8").decoder
    layers = [module for module in decoder.modules() if isinstance(module, Float8Linear)]
    assert len(layers) == 3 * 7
    assert not any(isinstance(module, nn.Linear) for module in decoder.modules())
    tensors = [*decoder.parameters(), *(buffer for layer in layers for buffer in layer.buffers())]
    assert not any(tensor.requires_grad for tensor in tensors), "or a backward pass would include the previous one"
    shape = LLMShape.of_folder(tiny_llm)
    assert sum(tensor.nbytes for tensor in tensors) == shape.weight_bytes(2, one_byte=True)


def test_each_token_is_rounded_on_its_own() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 48, dtype=torch.bfloat16)
    layer = Float8Linear(linear)
    x = torch.randn(2, 9, 64, dtype=torch.bfloat16) * torch.logspace(-3, 3, 9, dtype=torch.bfloat16)[:, None]
    x[1, 4] = 0
    x.requires_grad_()
    y = layer(x)
    assert y.dtype == torch.bfloat16
    alone = torch.stack([torch.stack([layer(token[None])[0] for token in row]) for row in x])
    assert torch.equal(y, alone), "a token of a different magnitude must not coarsen this one"
    assert torch.equal(y[1, 4], linear.bias)
    assert (y - linear(x)).abs().max(-1).values.div(linear(x).abs().max(-1).values).max() < 0.1
    buffers = dict(layer.named_buffers())
    weight = buffers["weight_OI"].float() * buffers["scale_O"][:, None]
    grad = torch.randn(y.shape, dtype=torch.bfloat16)
    (found,) = torch.autograd.grad(y, x, grad)
    torch.testing.assert_close(found.float(), grad.float() @ weight, rtol=0.02, atol=0.05)
    assert layer(x[:, :0]).shape == (2, 0, 48)


def test_unsupported_fp8_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_bitsandbytes: None) -> None:
    path = build_llm(tmp_path)
    config = LLMConfig(path=str(path), quantization="fp8")
    settings = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(settings | {"intermediate_size": 40}))
    with pytest.raises(LLMError, match=r"multiples of 16, and layers\.0\.mlp\.gate_proj has 40 x 32: set system"):
        check_llm(config)
    (path / "config.json").write_text(json.dumps(settings | {"quantization_config": {"quant_method": "bitsandbytes"}}))
    with pytest.raises(LLMError, match="cannot round weights that are quantized already"):
        check_llm(config)
    (path / "config.json").write_text(json.dumps(settings))
    monkeypatch.setattr(fp8, "accelerator", lambda: "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA RTX A6000")
    with pytest.raises(LLMError, match=r"capability 8\.9 \(Ada\) or later, and NVIDIA RTX A6000 has 8\.6: set system"):
        check_llm(config)
