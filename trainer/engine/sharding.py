"""Models that do not fit on one device: sharded over the ranks (ZeRO-3), or streamed through the device.

Both need every parameter to be read by the `forward` of the module that owns it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trainer.nn.module import Module


def shard(model: Module, settings: dict[str, Any], device: torch.device) -> None:
    """Shard the parameters over the ranks in place, one after the other; a collective.

    `deepspeed.initialize` does so too, but moves the whole model to the device first: 140 GB for 70B in bf16, where 8
    ranks need 18 GB each this way.

    Args:
        settings: DeepSpeed's configuration of the run, of ZeRO stage 3.
    """
    import deepspeed

    deepspeed.zero.Init(module=model, config_dict_or_path=json.loads(json.dumps(settings)))
    _move_buffers(model, device)  # which ZeRO-3 does not shard, and which `initialize` now leaves where they are


@contextmanager
def streamed(model: Module, device: torch.device) -> Iterator[None]:
    """While active, the model's parameters are on the device only while the module that owns them runs.

    For passes without gradient before the model is sharded. The parameters stay on the host, and may be changed there.
    """
    home: dict[nn.Parameter, Tensor] = {}

    def fetch(module: nn.Module, _: Any) -> None:
        for parameter in module.parameters(recurse=False):
            home[parameter] = parameter.data
            parameter.data = parameter.data.to(device)

    def release(module: nn.Module, *_: Any) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = home.pop(parameter)

    _move_buffers(model, device)
    modules = [module for _, module in model.named_modules()]
    hooks = [module.register_forward_pre_hook(fetch) for module in modules]
    hooks += [module.register_forward_hook(release) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _move_buffers(model: Module, device: torch.device) -> None:
    for _, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
