"""The linear layers of a decoder, which quantization replaces."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from trainer.nn.pretrained import LLMError


def linear_layers(decoder: PreTrainedModel) -> dict[str, nn.Linear]:
    """Every linear layer, by name."""
    return {name: module for name, module in decoder.named_modules() if isinstance(module, nn.Linear)}


def replace_linear_layers(decoder: PreTrainedModel, quantized: Callable[[nn.Linear], nn.Module]) -> None:
    """Replace every linear layer by its quantized form."""
    for name, linear in linear_layers(decoder).items():
        decoder.set_submodule(name, quantized(linear))


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
