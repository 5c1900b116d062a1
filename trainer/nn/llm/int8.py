"""The frozen LLM's linear layers with int8 weights, for memory: half of bf16, inexact by choice.

Weights are rounded once, with one scale per output channel: the largest absolute weight of the channel is 127. Inputs
are not rounded, so a token's result does not depend on its batch. In LLM.int8() (Dettmers et al. 2022), which the
official code uses, it does: the input features that are not rounded are chosen over all tokens of a pass.

Each pass converts one layer's weights at a time to the dtype of the inputs, in which integers up to 127 are exact, and
scales the result. The backward pass does the same, so that nothing but the int8 weights is kept for it.

Letters: T tokens, I and O input and output features of a layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_LARGEST = 127
_SMALLEST = 1e-12
"""Lower bound of the maximum that a scale is computed from, so that all-zero rows stay zero."""


class Int8Linear(nn.Module):
    """A frozen linear layer in int8. Its weights are buffers, so that no optimizer and no ZeRO stage touches them."""

    bias_O: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight_OI = linear.weight.detach().float()
        scale_O = weight_OI.abs().amax(1).clamp(min=_SMALLEST) / _LARGEST
        self.register_buffer("weight_OI", (weight_OI / scale_O[:, None]).round().to(torch.int8), persistent=False)
        self.register_buffer("scale_O", scale_O, persistent=False)
        self.register_buffer("bias_O", None if linear.bias is None else linear.bias.detach(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O), in the dtype of `x`."""
        y: Tensor = _Product.apply(x, self.weight_OI, self.scale_O)  # type: ignore[no-untyped-call]
        return y if self.bias_O is None else y + self.bias_O


class _Product(torch.autograd.Function):
    """`x` times the transposed weight; only `x` gets a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, scale_O: Tensor) -> Tensor:
        ctx.weight_OI, ctx.scale_O = weight_OI, scale_O
        return F.linear(x, weight_OI.to(x.dtype)).mul_(scale_O)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        # `out` has the dtype of the gradient: without it, the fp32 scale would make an fp32 copy.
        scaled = torch.mul(grad, ctx.scale_O, out=torch.empty_like(grad))
        return scaled @ ctx.weight_OI.to(grad.dtype), None, None
