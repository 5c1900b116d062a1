"""LoRA (Hu et al. 2022) through peft: adapters beside linear layers of the LLM, its only trained weights."""

from __future__ import annotations

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from trainer.config import LoRAConfig
from trainer.nn.dropout import TokenDropout, TokenHashes
from trainer.nn.llm.backbone import FrozenLLM
from trainer.nn.pretrained import LLMError


def add_adapters(llm: FrozenLLM, config: LoRAConfig) -> TokenHashes:
    """Add adapters to the LLM, in fp32; returns the token address that their dropout reads in training.

    Raises:
        LLMError: `config.targets` names a linear layer that the LLM does not have.
    """
    linear = {name.rsplit(".", 1)[-1] for name, module in llm.decoder.named_modules() if isinstance(module, nn.Linear)}
    if unknown := [name for name in config.targets if name not in linear]:
        raise LLMError(
            f"system.lora.targets names {unknown[0]}, which this LLM does not have: "
            f"choose from {', '.join(sorted(linear))}"
        )
    settings = LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=list(config.targets), bias="none")
    inject_adapter_in_model(settings, llm.decoder)
    address = TokenHashes()
    adapted = [module for module in llm.decoder.modules() if isinstance(module, LoraLayer)]
    for index, layer in enumerate(adapted):
        # peft's own dropout would draw different masks on different ranks.
        layer.lora_dropout["default"] = TokenDropout(config.dropout, index, address).eval()
    # peft creates adapters in the dtype of the layers beside them, which may be bf16.
    for parameter in llm.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)
    return address
