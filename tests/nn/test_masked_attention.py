"""Attention of padded groups and rows: KV heads repeated on accelerators, and Habana's kernel on a Gaudi.

`FusedSDPA` stands in for Habana's, which needs the device: the arguments of habana_frameworks' autograd function
(hpex/kernels), computed with torch.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from trainer import device, gaudi
from trainer.config import LLMConfig
from trainer.data.prompts.packing import PackedPrompts, pack
from trainer.data.prompts.prompt import READOUT_SLOT, Prompt
from trainer.data.prompts.row_packing import pack_rows
from trainer.nn.llm import attention, backbone

HEADS, KV_HEADS, WIDTH = 6, 2, 8


class FusedSDPA(torch.autograd.Function):
    """The signature of Habana's function; as many KV heads as query heads, which all its releases accept."""

    calls: ClassVar[list[tuple[Any, ...]]] = []

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        softmax_mode: str = "None",
        recompute_mode: bool | None = None,
        valid_seq_len: Tensor | None = None,
        seq_padding_type: str = "left",
    ) -> Tensor:
        assert attn_mask is not None
        assert q.shape[:2] == k.shape[:2] == v.shape[:2]
        FusedSDPA.calls.append((dropout_p, is_causal, softmax_mode, recompute_mode, valid_seq_len))
        ctx.scale = q.shape[-1] ** -0.5 if scale is None else scale
        weight = (q @ k.transpose(-1, -2) * ctx.scale).masked_fill(~attn_mask, float("-inf")).softmax(-1)
        ctx.save_for_backward(q, k, v, weight)
        mixed: Tensor = weight @ v
        return mixed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weight = ctx.saved_tensors
        of_weight = grads[0] @ v.transpose(-1, -2)
        of_score = weight * (of_weight - (of_weight * weight).sum(-1, keepdim=True)) * ctx.scale
        return of_score @ k, of_score.transpose(-1, -2) @ q, weight.transpose(-1, -2) @ grads[0], *[None] * 8


@pytest.fixture
def on_a_gaudi(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Habana's kernels can be imported, and this process is one on a Gaudi."""
    names = ("habana_frameworks", "habana_frameworks.torch", "habana_frameworks.torch.hpex")
    for name in (*names, "habana_frameworks.torch.hpex.kernels"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    vars(sys.modules["habana_frameworks.torch.hpex.kernels"])["FusedSDPA"] = FusedSDPA
    monkeypatch.setattr(device, "on_gaudi", lambda: True)
    gaudi.fused_attention.cache_clear()
    FusedSDPA.calls.clear()
    yield
    gaudi.fused_attention.cache_clear()


def _inputs(device_type: str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys, values and a mask of two groups, in which every query sees a key."""
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(2, heads, size, WIDTH) for heads, size in ((HEADS, 5), (KV_HEADS, 7), (KV_HEADS, 7))
    )
    visible = torch.rand(2, 1, 5, 7) < 0.5
    visible[..., 0] = True
    query, key, value = (x.to(device_type).requires_grad_() for x in (query, key, value))
    return query, key, value, visible.to(device_type)


def _with_gradients(mixed: Tensor, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    return [mixed.detach(), *torch.autograd.grad(mixed.square().sum(), inputs)]


def test_repeated_heads_give_the_same_attention() -> None:
    query, key, value, visible = _inputs()
    shared = attention.masked_attention(query, key, value, visible, 0.3)
    keys, values = (attention._repeated(x, HEADS // KV_HEADS) for x in (key, value))
    repeated = attention.masked_attention(query, keys, values, visible, 0.3)
    for ours, theirs in zip(*(_with_gradients(x, (query, key, value)) for x in (repeated, shared)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_an_accelerator_gets_as_many_kv_heads_as_query_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's memory-efficient kernel, the only one on CUDA that takes a mask or fp32, refuses fewer."""
    called: list[tuple[int, int, bool]] = []
    real = F.scaled_dot_product_attention

    def recording(query: Tensor, key: Tensor, value: Tensor, **more: Any) -> Tensor:
        called.append((query.shape[1], key.shape[1], more["enable_gqa"]))
        return real(query, key, value, **more)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recording)
    for device_type in ("meta", "cpu"):
        attention.masked_attention(*_inputs(device_type), None)
    assert called == [(HEADS, HEADS, False), (HEADS, KV_HEADS, True)]


def test_habanas_kernel_computes_attention(on_a_gaudi: None) -> None:
    query, key, value, visible = _inputs()
    fused = device.fused_attention()
    assert fused is not None
    for scale in (None, 0.3):
        found = attention.masked_attention(query, key, value, visible, scale, fused)
        expected = attention.masked_attention(query, key, value, visible, scale)
        for ours, theirs in zip(*(_with_gradients(x, (query, key, value)) for x in (found, expected)), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    # No dropout, the mask alone says what is seen, exact softmax, and weights that are not kept for the backward pass.
    assert FusedSDPA.calls == [(0.0, False, "None", True, None)] * 2


def _prompts() -> list[Prompt]:
    found = []
    for length in (9, 30, 17):
        token_T, slot_S = np.random.default_rng(length).integers(0, 400, length), np.array([2, length - 1])
        found.append(Prompt(token_T, slot_S, np.array([1, READOUT_SLOT]), slot_S[-1:]))
    return found


def _hidden(llm: Any, packed: PackedPrompts) -> Tensor:
    hidden_RD: Tensor = llm(packed, torch.zeros(len(packed.slot_S), llm.dim))
    return hidden_RD


def test_every_layer_of_an_llm_uses_habanas_kernel(on_a_gaudi: None, tiny_llm: Path) -> None:
    llm = backbone.load_llm(LLMConfig(path=str(tiny_llm), dtype="float32"))
    packed = pack_rows(_prompts(), 32)
    FusedSDPA.calls.clear()  # of the check of packed prompts at load
    with torch.no_grad():
        found = _hidden(llm, packed)
        layers, FusedSDPA.calls[:] = len(FusedSDPA.calls), []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(device, "on_gaudi", lambda: False)
            expected = _hidden(llm, packed)
    assert layers == llm.decoder.config.num_hidden_layers
    assert not FusedSDPA.calls
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_software_without_the_kernel_is_reported(
    on_a_gaudi: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "habana_frameworks.torch.hpex.kernels", None)
    assert device.fused_attention() is None
    assert "Habana's FusedSDPA cannot be imported" in caplog.text


@pytest.mark.parametrize(
    ("accelerator", "dtype", "width", "needed"),
    [
        ("cuda", torch.bfloat16, 128, False),
        ("cuda", torch.float32, 128, True),
        ("cuda", torch.bfloat16, 100, True),
        ("cpu", torch.bfloat16, 128, True),
    ],
)
def test_groups_are_needed_where_no_kernel_reads_segments(
    monkeypatch: pytest.MonkeyPatch, accelerator: str, dtype: torch.dtype, width: int, needed: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("DS_ACCELERATOR", accelerator)
    monkeypatch.setattr(attention, "_installed_kernel", lambda: attend_nothing)
    assert attention.reads_groups(dtype, width) == needed
    monkeypatch.setattr(attention, "_installed_kernel", lambda: None)
    assert attention.reads_groups(dtype, width)


def attend_nothing(*_: Any) -> Tensor:
    """A variable-length kernel that is not called."""
    raise AssertionError


def test_a_stream_without_groups_is_otherwise_the_same() -> None:
    whole, lean = pack(_prompts()), pack(_prompts(), grouped=False)
    assert whole.frozen is not None
    assert lean.frozen is not None
    for ours, theirs in ((lean.frozen, whole.frozen), (lean.trained, whole.trained)):
        assert theirs.groups
        assert (ours.groups, ours.query_index_T) == ((), None)
        assert ours.segments is not None
        assert theirs.segments is not None
        assert torch.equal(ours.token_T, theirs.token_T)
        assert torch.equal(ours.segments.key_J, theirs.segments.key_J)
    assert torch.equal(lean.readout_R, whole.readout_R)
