"""The frozen decoder's own elementwise parts: same values and gradients as transformers', fewer saved tensors."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GemmaConfig, LlamaConfig
from transformers.models.gemma.modeling_gemma import GemmaMLP, GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from trainer.nn.llm import fused

ROWS, WIDTH = 70, 24


@pytest.fixture(autouse=True)
def _several_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_CHUNK_BYTES", 8 * WIDTH * 4)


def norm() -> nn.Module:
    module = LlamaRMSNorm(WIDTH, eps=1e-2)  # large enough to show in the result
    nn.init.uniform_(module.weight, -2, 2)
    return module.requires_grad_(False)


def feed_forward() -> nn.Module:
    torch.manual_seed(0)
    settings = LlamaConfig(hidden_size=WIDTH, intermediate_size=40, mlp_bias=True, num_attention_heads=2)
    return LlamaMLP(settings).requires_grad_(False)


def both(make: Callable[[], nn.Module], dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    plain = make().to(dtype)
    ours = deepcopy(plain)
    fused.fuse(ours)
    assert "forward" in vars(ours), "no part was replaced"
    return plain, ours


def value_and_gradient(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    value = module(x)
    (gradient,) = torch.autograd.grad((value.float() * torch.arange(value.shape[-1])).square().sum(), x)
    return value.detach(), gradient


@pytest.mark.parametrize("make", [norm, feed_forward])
@pytest.mark.parametrize("shape", [(ROWS, WIDTH), (1, ROWS, WIDTH), (2, 5, 7, WIDTH), (1, 0, WIDTH)])
def test_values_and_gradients_equal_transformers(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    plain, ours = both(make, torch.float32)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 3
    for found, expected in zip(value_and_gradient(ours, x), value_and_gradient(plain, x), strict=True):
        torch.testing.assert_close(
            found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max() if x.numel() else 1)
        )


@pytest.mark.parametrize("make", [norm, feed_forward])
def test_half_precision_is_as_close_to_full_as_that_of_transformers(make: Callable[[], nn.Module]) -> None:
    plain, ours = both(make, torch.bfloat16)
    exact = deepcopy(plain).float()
    x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1)).bfloat16()
    rows = zip(
        value_and_gradient(ours, x), value_and_gradient(plain, x), value_and_gradient(exact, x.float()), strict=True
    )
    for found, expected, true in rows:
        assert found.dtype == torch.bfloat16
        assert (found - true).norm() <= 1.1 * (expected - true).norm()


def test_only_tensors_for_the_input_gradient_are_saved() -> None:
    plain, ours = both(feed_forward, torch.float32)
    of_one_product = ROWS * 40 * 4
    assert kept_bytes(ours) == 2 * of_one_product
    assert kept_bytes(plain) == 3 * of_one_product


def kept_bytes(module: nn.Module) -> int:
    """Bytes that one forward pass saves for the gradient of its input, excluding weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(torch.randn(ROWS, WIDTH, requires_grad=True))
    return sum(seen.values())


def test_unknown_kinds_of_parts_are_not_replaced() -> None:
    others: list[Any] = [GemmaRMSNorm(8), GemmaMLP(GemmaConfig(hidden_size=8, intermediate_size=8))]
    for module in others:
        fused.fuse(module)
        assert "forward" not in vars(module)
