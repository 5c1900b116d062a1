"""The linear layers of a decoder: their replacement by quantized forms, and those that a folder holds quantized."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from trainer.nn.pretrained import LLMError

_LEAST = 0.9
"""Least part of the layers' weights that quantization must reach."""


def linear_layers(decoder: PreTrainedModel) -> dict[str, nn.Linear]:
    """Every linear layer, by name."""
    return {name: module for name, module in decoder.named_modules() if isinstance(module, nn.Linear)}


def replace_linear_layers(decoder: PreTrainedModel, quantized: Callable[[nn.Linear], nn.Module]) -> None:
    """Replace every linear layer by its quantized form."""
    for name, linear in linear_layers(decoder).items():
        decoder.set_submodule(name, quantized(linear))


def check_linear(layers: nn.Module, quantization: str) -> None:
    """Check that nearly all weights of the decoder's layers are those of linear layers, which quantization replaces.

    Raises:
        LLMError: others, such as the experts of a mixture, would keep their size.
    """
    linear = sum(module.weight.numel() for module in layers.modules() if isinstance(module, nn.Linear))
    part = linear / sum(parameter.numel() for parameter in layers.parameters())
    if part < _LEAST:
        raise LLMError(
            f"system.llm.quantization={quantization} rounds linear layers, which hold {100 * part:.0f} % of the "
            "weights of this model's layers: set system.llm.quantization=none"
        )


def quantized_layers(modules: nn.Module) -> list[Any]:
    """The linear layers of bitsandbytes, in whose form a folder may hold its weights."""
    return [module for module in modules.modules() if type(module).__module__.startswith("bitsandbytes")]


def dequantized(module: Any) -> nn.Linear:
    """The linear layer that bitsandbytes' stands for, in fp32."""
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
    weight = dequantize_bnb_weight(module.weight, getattr(module, "state", None))
    linear.weight = nn.Parameter(weight.float().cpu().reshape(module.out_features, module.in_features), False)
    if module.bias is not None:
        linear.bias = nn.Parameter(module.bias.detach().float().cpu(), False)
    return linear


def keep_gradients(decoder: PreTrainedModel) -> None:
    """Keep bitsandbytes' layers in the form that passes gradients on.

    On a CPU with bf16 units its 4-bit layers repack their weights in the first pass without gradient, and would then
    give their input no gradient in any later pass.
    """
    for module in quantized_layers(decoder):
        module.support_avx512bf16_for_cpu = False


def check_not_quantized(settings: PretrainedConfig, quantization: str) -> None:
    """Check that the folder's weights are not quantized already.

    Raises:
        LLMError: they are; the message names the cure.
    """
    if hasattr(settings, "quantization_config"):
        raise LLMError(
            f"system.llm.quantization={quantization} cannot round weights that are quantized already: "
            "set system.llm.quantization=none, or system.llm.path to the same model in bf16 or fp32"
        )
