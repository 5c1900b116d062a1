"""The frozen LLM's linear layers in fp8 (e4m3: 3 bits of mantissa), inexact by choice.

Weights are rounded once, with one scale per output channel. Inputs are rounded at each call, with one scale per token,
so that a token's result does not depend on its batch. The product is computed in fp8 and returned in bf16.

The backward pass computes nothing in fp8: it multiplies gradients in bf16 with the rounded weights, and ignores the
rounding of inputs (a straight-through estimator).

Letters: T tokens, I and O input and output features of a layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, PretrainedConfig

from trainer.device import accelerator
from trainer.nn.llm.linear_layers import linear_layers
from trainer.nn.pretrained import LLMError

_FP8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(_FP8).max
_SMALLEST = 1e-12
"""Lower bound of the maximum that a scale is computed from, so that all-zero rows stay zero."""
_MULTIPLE = 16
"""Input and output features must be multiples of this: torch has no other fp8 product."""
_CURE = "set system.llm.quantization=none (or int8)"


class Float8Linear(nn.Module):
    """A frozen linear layer in fp8. Its weights are buffers, so that no optimizer and no ZeRO stage touches them."""

    bias_O: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight_OI = linear.weight.detach().float()
        scale_O = weight_OI.abs().amax(1).clamp(min=_SMALLEST) / _LARGEST
        self.register_buffer("weight_OI", (weight_OI / scale_O[:, None]).to(_FP8), persistent=False)
        self.register_buffer("scale_O", scale_O, persistent=False)
        self.register_buffer("bias_O", None if linear.bias is None else linear.bias.detach(), persistent=False)
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) in bf16 -> (..., O) in bf16."""
        y_TO: Tensor = _Product.apply(x.flatten(0, -2), self.weight_OI, self.scale_O)  # type: ignore[no-untyped-call]
        y = y_TO.view(*x.shape[:-1], self.out_features)
        return y if self.bias_O is None else y + self.bias_O


class _Product(torch.autograd.Function):
    """x_TI times the transposed weight, (T, O) in bf16; only the input gets a gradient."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, weight_OI: Tensor, scale_O: Tensor) -> Tensor:
        ctx.weight_OI, ctx.scale_O = weight_OI, scale_O
        if not len(x_TI):  # a pass without read-outs; cuBLAS rejects empty inputs
            return x_TI.new_empty(0, len(weight_OI))
        # The norm is the largest absolute value, found in one pass over the inputs.
        largest_T1 = torch.linalg.vector_norm(x_TI, torch.inf, dim=1, keepdim=True)
        factor_T1 = _LARGEST / largest_T1.clamp_(min=_SMALLEST)
        # Scaled in bf16: copying the inputs to fp32 would cost the time that the fp8 product saves.
        return torch._scaled_mm(
            (x_TI * factor_T1).to(_FP8),
            weight_OI.t(),
            scale_a=factor_T1.float().reciprocal(),
            scale_b=scale_O[None],
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        # bf16 holds every e4m3 value exactly. The gradient is scaled rather than the weight, because it is smaller.
        # `out` has the dtype of the gradient: without it, the fp32 scale would make an fp32 copy.
        scaled_TO = torch.mul(grads[0], ctx.scale_O, out=torch.empty_like(grads[0]))
        return scaled_TO @ ctx.weight_OI.to(torch.bfloat16), None, None


def check_fp8(settings: PretrainedConfig) -> None:
    """Check that the model's linear layers can run in fp8 on this device, without loading its weights.

    Raises:
        LLMError: they cannot; the message names the cure.
    """
    if accelerator() == "cuda" and (found := torch.cuda.get_device_capability()) < (8, 9):
        raise LLMError(
            f"system.llm.quantization=fp8 needs a GPU of compute capability 8.9 (Ada) or later, and "
            f"{torch.cuda.get_device_name()} has {found[0]}.{found[1]}: {_CURE}"
        )
    with torch.device("meta"):  # layer sizes without memory
        decoder = AutoModel.from_config(settings, trust_remote_code=False)
    for name, linear in linear_layers(decoder).items():
        if linear.in_features % _MULTIPLE or linear.out_features % _MULTIPLE:
            raise LLMError(
                f"system.llm.quantization=fp8 needs layer sizes that are multiples of {_MULTIPLE}, and {name} "
                f"has {linear.out_features} x {linear.in_features}: {_CURE}"
            )
