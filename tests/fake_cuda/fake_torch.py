"""Makes this process a rank on a CUDA device where there is none, for fake tensors.

`torch.cuda` answers as if there were one, so that DeepSpeed takes its CUDA accelerator; collectives of a process group
of any size return at once. `fake_device.load_library` comes first.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from fake_trace import host_waits
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional
from torch.testing._internal.distributed.fake_pg import FakeStore

from trainer.nn import dropout

_PER_NODE = 8
_CAPABILITY = (9, 0)
_MEMORY = 141 * 10**9


def install() -> None:
    """Let torch and DeepSpeed find the device; once per process."""
    os.environ.update(DS_ACCELERATOR="cuda", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    fakes: Any = FakeTensorMode
    fakes.avoid_device_init = property(lambda mode: True)
    _replace_torch_cuda()
    _replace_methods()


def join(rank: int, ranks: int) -> torch.device:
    """Become rank `rank` of `ranks`, in a process group that sends nothing; returns its device."""
    import deepspeed
    from deepspeed.runtime.zero import partitioned_param_coordinator
    from deepspeed.utils import groups

    if deepspeed.comm.is_initialized():
        deepspeed.comm.destroy_process_group()
        groups._WORLD_GROUP = groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
        functional.linear = _real_linear  # ZeRO-3 replaces it
    # Each rank sees one device, its own.
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK="0")
    os.environ.update(LOCAL_WORLD_SIZE=str(min(ranks, _PER_NODE)))
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    deepspeed.init_distributed(dist_backend="nccl", verbose=False)
    # ZeRO-3 checks that ranks agree by comparing what they sent, which is nothing here.
    partitioned_param_coordinator.assert_ints_same_as_other_ranks = lambda numbers: None
    return torch.device("cuda:0")


class _Event:
    def __init__(self, **options: Any) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Any) -> float:
        return 1.0


class _Stream:
    cuda_stream = 0

    def __init__(self, *arguments: Any, **options: Any) -> None: ...

    def wait_stream(self, other: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...


def _replace_torch_cuda() -> None:
    """The functions of `torch.cuda` that DeepSpeed's CUDA accelerator and the project call."""

    class Event(_Event):
        def synchronize(self) -> None:
            host_waits("event")

    class Stream(_Stream):
        def synchronize(self) -> None:
            host_waits("stream")

    major, minor = _CAPABILITY
    _replace_torch_cuda_constants(
        is_available=True, device_count=1, current_device=0, set_device=None, get_device_name="fake",
        is_bf16_supported=True,
        get_device_capability=_CAPABILITY, is_current_stream_capturing=False, current_stream=Stream(),
        get_device_properties=SimpleNamespace(total_memory=_MEMORY, major=major, minor=minor),
        default_stream=Stream(), manual_seed=None, manual_seed_all=None, empty_cache=None,
        reset_peak_memory_stats=None, memory_allocated=0, max_memory_allocated=0, memory_reserved=0,
        max_memory_reserved=0, memory_stats={},
    )  # fmt: skip
    cuda: Any = torch.cuda
    cuda.stream = lambda chosen: nullcontext()
    cuda.nvtx = SimpleNamespace(range_push=lambda *arguments: None, range_pop=lambda *arguments: None)
    cuda.synchronize = lambda device=None: host_waits("synchronize")
    cuda.Event, cuda.Stream = Event, Stream


def _replace_torch_cuda_constants(**values: Any) -> None:
    """Functions that return a constant, whatever they are asked."""
    for name, value in values.items():
        setattr(torch.cuda, name, lambda *arguments, _value=value, **options: _value)


def _replace_methods() -> None:
    """Parts of torch that a fake tensor on CUDA would take another way than a real one."""
    changed: Any = functional
    changed.rms_norm = _rms_norm
    changed = dropout
    changed._fused_kernel = lambda device: _fused_dropout
    changed = nn.Module
    changed._apply = _apply
    changed = Tensor
    changed.record_stream = lambda tensor, stream: None

    def tolist(tensor: Tensor) -> Any:
        if tensor.is_cuda:
            host_waits("copy to host")  # one, where `FakeTensor.tolist` reads value by value
        return np.ones(tuple(tensor.shape)).tolist()

    changed = FakeTensor
    changed.tolist = tolist


def _apply(module: Any, change: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
    """`nn.Module._apply`, which cannot move a fake parameter to another device; here a new one takes its place."""
    for child in module.children():
        child._apply(change)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            with torch.no_grad():
                changed = change(parameter)
            if (changed.device, changed.dtype) != (parameter.device, parameter.dtype):
                module._parameters[name] = nn.Parameter(changed, parameter.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = change(buffer)
    return module


# On CUDA `F.rms_norm` is one kernel, which saves its input, the weight and one fp32 number per row. A CPU build of
# torch takes it apart, so that an operation without a kernel stands for it.

_real_rms_norm, _real_linear = functional.rms_norm, functional.linear


def _rms_norm(input: Tensor, shape: Any, weight: Tensor, eps: float | None = None) -> Tensor:  # noqa: A002
    if not input.is_cuda:
        return _real_rms_norm(input, shape, weight, eps)
    normal: Tensor = _fused_rms_norm(input, weight)[0]
    return normal


@torch.library.custom_op("fake_cuda::rms_norm", mutates_args=())
def _fused_rms_norm(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    raise NotImplementedError


@_fused_rms_norm.register_fake
def _(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


@torch.library.custom_op("fake_cuda::rms_norm_backward", mutates_args=())
def _fused_rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    raise NotImplementedError


@_fused_rms_norm_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("fake_cuda::dropout", mutates_args=())
def _fused_dropout(x: Tensor, word: Tensor, salt: int, threshold: int, kept_share: float) -> Tensor:
    """Stands for the Triton kernel, which is one kernel too."""
    raise NotImplementedError


@_fused_dropout.register_fake
def _(x: Tensor, word: Tensor, salt: int, threshold: int, kept_share: float) -> Tensor:
    return torch.empty_like(x)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])


def _backward(ctx: Any, grad: Tensor, grad_of_scale: Tensor) -> tuple[Tensor, None]:
    return _fused_rms_norm_backward(grad, *ctx.saved_tensors), None


_fused_rms_norm.register_autograd(_backward, setup_context=_save)
