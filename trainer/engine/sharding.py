"""Where the weights are when a run starts.

Frozen weights are compared between ranks instead of broadcast, because each rank has read them from its own files.
DeepSpeed broadcasts every parameter when it starts, 6.5 GB for a frozen 3B model in bf16; a checksum of each tensor is
four bytes. Trained parameters are still broadcast, so that they start equal on all ranks.

Models that do not fit on one device are sharded over the ranks (ZeRO-3), or streamed through the device. Both need
every parameter to be read by the `forward` of the module that owns it.

Letters: R ranks, P tensors.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trainer.config import ConfigError
from trainer.distributed import World
from trainer.nn.module import Module

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}
"""Integers that the bits of an element are read as, by its size in bytes."""
_KEPT = "ds_optim_param"
"""DeepSpeed's mark of parameters that it does not broadcast, those of its `OptimizedLinear`."""


def shard(model: Module, settings: dict[str, Any], device: torch.device) -> dict[str, Tensor]:
    """Shard the parameters over the ranks in place, one after the other; a collective.

    `deepspeed.initialize` does so too, but moves the whole model to the device first: 140 GB for 70B in bf16, where 8
    ranks need 18 GB each this way.

    Args:
        settings: DeepSpeed's configuration of the run, of ZeRO stage 3.

    Returns:
        Checksums of the frozen parameters by name, each taken while the parameter was whole.
    """
    import deepspeed

    found: dict[nn.Parameter, Tensor] = {}

    class Init(deepspeed.zero.Init):  # type: ignore[misc]
        """Broadcasts only parameters that are trained: see `check_equal`."""

        def _zero_init_param(self, param: Any) -> None:
            if param.requires_grad:
                super()._zero_init_param(param)
                return
            found[param] = checksum(param.data)
            self._convert_to_deepspeed_param(param)
            param.partition()

    Init(module=model, config_dict_or_path=json.loads(json.dumps(settings)))
    _move_buffers(model, device)  # which ZeRO-3 does not shard, and which `initialize` now leaves where they are
    return {name: found[parameter] for name, parameter in model.named_parameters() if parameter in found}


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


@contextmanager
def not_broadcast(model: Module) -> Iterator[None]:
    """While active, `deepspeed.initialize` does not broadcast the frozen parameters."""
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    for parameter in frozen:
        setattr(parameter, _KEPT, True)
    try:
        yield
    finally:
        for parameter in frozen:
            delattr(parameter, _KEPT)


def checksum(tensor: Tensor) -> Tensor:
    """Wrapping sum of the bits as integers, an int32 scalar on the tensor's device; reads it once, copies nothing."""
    words = tensor.detach().reshape(-1).view(_WORDS[tensor.element_size()])
    return words.sum(dtype=torch.int32)


def frozen_checksums(model: Module) -> dict[str, Tensor]:
    """Checksums of the frozen parameters, and of the buffers that hold quantized weights, by name."""
    frozen = {name: parameter for name, parameter in model.named_parameters() if not parameter.requires_grad}
    quantized = {
        f"{path}.{name}": buffer
        for path, module in model.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if buffer.element_size() == 1
    }
    return {name: checksum(tensor) for name, tensor in (frozen | quantized).items()}


def check_equal(world: World, found: Mapping[str, Tensor]) -> None:
    """Compare the checksums of all ranks; a collective.

    Raises:
        ConfigError: on every rank alike, if a rank has other weights than rank 0.
    """
    if world.size == 1 or not found:
        return
    own_1P = torch.stack(list(found.values()))[None]
    with world.heartbeat.collective():
        sum_RP = world.all_gather_rows(own_1P, [1] * world.size).tolist()
    for rank, sum_P in enumerate(sum_RP):
        differing = [name for name, one, other in zip(found, sum_RP[0], sum_P, strict=True) if one != other]
        if differing:
            raise ConfigError(
                f"rank {rank} has read other frozen weights than rank 0 ({len(differing)} of {len(found)} tensors, "
                f"the first is {differing[0]}): its node holds a different or damaged copy of system.llm.path, of the "
                "text encoder or of the teacher's run; copy it again, or let all nodes read the same one"
            )
