"""Elementwise parts of a frozen decoder, whose weights need no gradient: they save only what the gradient of their
input needs, and on a CPU work in chunks that stay in its cache.

Values and gradients equal those of transformers' modules, up to rounding (`tests/nn/test_fused.py`).

Letters: T rows (tokens, or tokens and heads), D width of the norm, I width of the gated product.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_CHUNK_BYTES = 1 << 20
"""Bytes per chunk of one operand; a few such chunks fit in a core's cache."""


def fuse(decoder: nn.Module) -> None:
    """Replace the forwards of the decoder's RMS norms and SiLU-gated feed-forward modules by those of this file.

    Other forms keep their own: norms that multiply by 1 + weight (Gemma), other activations.
    """
    for module in decoder.modules():
        # Gemma's norms call their epsilon `eps`.
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
    fed: Tensor = module.down_proj(silu_gate(module.gate_proj(x), module.up_proj(x)))
    return fed


def rms_norm(x: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
    """weight * x / sqrt(mean(x²) + epsilon) over the last dimension (Zhang and Sennrich 2019), computed in fp32.

    `x` is (..., D), and so is the result. The weight gets no gradient.
    """
    if x.device.type != "cpu":  # accelerators have a fused kernel
        return F.rms_norm(x, weight_D.shape, weight_D, epsilon)
    normal_TD: Tensor = _RMSNorm.apply(x.reshape(-1, x.shape[-1]), weight_D, epsilon)  # type: ignore[no-untyped-call]
    return normal_TD.view(x.shape)


def silu_gate(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020), elementwise; saves only these two tensors for the backward pass."""
    rows = (x.reshape(-1, x.shape[-1]) for x in (gate, up))
    product_TI: Tensor = _Gated.apply(*rows)  # type: ignore[no-untyped-call]
    return product_TI.view(gate.shape)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
        scale_T1 = torch.empty(len(x_TD), 1)
        out_TD = torch.empty_like(x_TD)
        for rows in _chunks(x_TD):
            x = x_TD[rows].float()
            scale_T1[rows] = torch.rsqrt(torch.linalg.vecdot(x, x).div_(x.shape[-1]).add_(epsilon))[:, None]
            out_TD[rows] = (x * scale_T1[rows]).mul_(weight_D)
        ctx.save_for_backward(x_TD, weight_D, scale_T1)
        return out_TD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad_TD,) = grads
        x_TD, weight_D, scale_T1 = ctx.saved_tensors
        out_TD = torch.empty_like(x_TD)
        for rows in _chunks(x_TD):
            x, scale = x_TD[rows].float(), scale_T1[rows]
            grad = grad_TD[rows].float() * weight_D
            # With s the scale and g = grad * weight: dx = s g - x s³ ⟨g, x⟩ / D.
            along = torch.linalg.vecdot(grad, x)[:, None] * scale**3 / -x.shape[-1]
            out_TD[rows] = grad.mul_(scale).addcmul_(x, along)
        return out_TD, None, None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_TI: Tensor, up_TI: Tensor) -> Tensor:
        ctx.save_for_backward(gate_TI, up_TI)
        out_TI = torch.empty_like(gate_TI)
        for rows in _chunks(gate_TI):
            torch.mul(F.silu(gate_TI[rows]), up_TI[rows], out=out_TI[rows])
        return out_TI

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (grad_TI,) = grads
        gate_TI, up_TI = ctx.saved_tensors
        gate_grad_TI, up_grad_TI = torch.empty_like(gate_TI), torch.empty_like(up_TI)
        for rows in _chunks(gate_TI):
            gate, grad = gate_TI[rows], grad_TI[rows]
            torch.mul(grad, F.silu(gate), out=up_grad_TI[rows])  # silu is recomputed rather than saved
            torch.ops.aten.silu_backward.grad_input(grad * up_TI[rows], gate, grad_input=gate_grad_TI[rows])
        return gate_grad_TI, up_grad_TI


def _chunks(x_TI: Tensor) -> Iterator[slice]:
    """All rows at once; on a CPU chunks of rows that stay in its cache."""
    rows = len(x_TI) if x_TI.device.type != "cpu" else _CHUNK_BYTES // (x_TI.shape[1] * x_TI.element_size())
    for first in range(0, len(x_TI), max(rows, 1)):
        yield slice(first, first + max(rows, 1))
