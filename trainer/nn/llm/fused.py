"""Elementwise parts of a frozen decoder, for a model whose weights need no gradient: they keep only what the gradient
of their input needs, and on a CPU work on stretches that stay in its cache.

Values and gradients are those of transformers' modules, to rounding (`tests/nn/test_fused.py`).

Letters: N rows (tokens, or tokens and heads), D width of what is normalized, I width of the gated product.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_STRETCH_BYTES = 1 << 20
"""Of one operand: some of them fit a core's cache."""


def fuse(decoder: nn.Module) -> None:
    """Give the decoder's RMS norms and SiLU-gated feed-forward parts the forwards of this file.

    Parts of another form keep their own: norms that weigh by 1 + weight (Gemma), other non-linearities.
    """
    for module in decoder.modules():
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            module.forward = partial(_normalize, module)
        elif {"gate_proj", "up_proj", "down_proj"} <= {name for name, _ in module.named_children()} and _is_silu(
            module
        ):
            module.forward = partial(_feed_forward, module)


def _is_silu(feed_forward: Any) -> bool:
    return type(getattr(feed_forward, "act_fn", None)).__name__ in ("SiLU", "SiLUActivation")


def _normalize(module: Any, hidden_states: Tensor) -> Tensor:
    return rms_norm(hidden_states, module.weight, module.variance_epsilon)


def _feed_forward(module: Any, x: Tensor) -> Tensor:
    fed: Tensor = module.down_proj(gated(module.gate_proj(x), module.up_proj(x)))
    return fed


def rms_norm(x: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
    """weight * x / sqrt(mean(x²) + epsilon) over the last dimension (Zhang and Sennrich 2019), computed in fp32.

    The weight gets no gradient.
    """
    if x.device.type != "cpu":  # has a kernel of its own
        return F.rms_norm(x, weight_D.shape, weight_D, epsilon)
    normal_ND: Tensor = _RMSNorm.apply(x.reshape(-1, x.shape[-1]), weight_D, epsilon)  # type: ignore[no-untyped-call]
    return normal_ND.view(x.shape)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020), elementwise. For the gradient it keeps these two alone."""
    rows = (x.reshape(-1, x.shape[-1]) for x in (gate, up))
    product_NI: Tensor = _Gated.apply(*rows)  # type: ignore[no-untyped-call]
    return product_NI.view(gate.shape)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
        scale_N1 = torch.empty(len(x_ND), 1)
        out_ND = torch.empty_like(x_ND)
        for rows in _stretches(x_ND):
            x = x_ND[rows].float()
            scale_N1[rows] = torch.rsqrt(torch.linalg.vecdot(x, x).div_(x.shape[-1]).add_(epsilon))[:, None]
            out_ND[rows] = (x * scale_N1[rows]).mul_(weight_D)
        ctx.save_for_backward(x_ND, weight_D, scale_N1)
        return out_ND

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad_ND,) = grads
        x_ND, weight_D, scale_N1 = ctx.saved_tensors
        out_ND = torch.empty_like(x_ND)
        for rows in _stretches(x_ND):
            x, scale = x_ND[rows].float(), scale_N1[rows]
            grad = grad_ND[rows].float() * weight_D
            along = torch.linalg.vecdot(grad, x)[:, None] * scale**3 / -x.shape[-1]
            out_ND[rows] = grad.mul_(scale).addcmul_(x, along)
        return out_ND, None, None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_NI: Tensor, up_NI: Tensor) -> Tensor:
        ctx.save_for_backward(gate_NI, up_NI)
        out_NI = torch.empty_like(gate_NI)
        for rows in _stretches(gate_NI):
            torch.mul(F.silu(gate_NI[rows]), up_NI[rows], out=out_NI[rows])
        return out_NI

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (grad_NI,) = grads
        gate_NI, up_NI = ctx.saved_tensors
        of_gate_NI, of_up_NI = torch.empty_like(gate_NI), torch.empty_like(up_NI)
        for rows in _stretches(gate_NI):
            gate, grad = gate_NI[rows], grad_NI[rows]
            torch.mul(grad, F.silu(gate), out=of_up_NI[rows])
            torch.ops.aten.silu_backward.grad_input(grad * up_NI[rows], gate, grad_input=of_gate_NI[rows])
        return of_gate_NI, of_up_NI


def _stretches(x_NI: Tensor) -> Iterator[slice]:
    """All rows; on a CPU so many at a time as stay in its cache."""
    rows = len(x_NI) if x_NI.device.type != "cpu" else _STRETCH_BYTES // (x_NI.shape[1] * x_NI.element_size())
    for first in range(0, len(x_NI), max(rows, 1)):
        yield slice(first, first + max(rows, 1))
