"""LoRA (Hu et al. 2022) through peft: adapters beside linear layers of the LLM, the only parts of it that train."""

from __future__ import annotations

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from trainer.config import LoRAConfig
from trainer.nn.dropout import TokenAddress, TokenDropout
from trainer.nn.llm.backbone import FrozenLLM
from trainer.nn.pretrained import LLMError


def add_adapters(llm: FrozenLLM, config: LoRAConfig) -> TokenAddress:
    """Put adapters into the LLM, in fp32; returns the address that their dropout reads in training.

    Raises:
        LLMError: the LLM has no linear layer of one of the names `config.targets`.
    """
    linear = {name.rsplit(".", 1)[-1] for name, module in llm.decoder.named_modules() if isinstance(module, nn.Linear)}
    if unknown := [name for name in config.targets if name not in linear]:
        raise LLMError(
            f"system.lora.targets names {unknown[0]}, which this LLM has not: choose from {', '.join(sorted(linear))}"
        )
    settings = LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=list(config.targets), bias="none")
    inject_adapter_in_model(settings, llm.decoder)
    address = TokenAddress()
    adapted = [module for module in llm.decoder.modules() if isinstance(module, LoraLayer)]
    for number, layer in enumerate(adapted):
        # peft's own dropout would draw other masks on other ranks.
        layer.lora_dropout["default"] = TokenDropout(config.dropout, number, address).eval()
    for parameter in llm.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)
    return address
