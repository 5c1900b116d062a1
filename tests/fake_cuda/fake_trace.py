"""Records what a program asks of a CUDA device whose tensors are fake: memory, kernels, copies, and waits of the host.

Nothing is computed. Where a program reads a value, it gets a constant: 1, or False.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

_PROJECT = Path(__file__).parents[2]
_BLOCK = 512
"""Bytes that the caching allocator rounds up to."""
_NO_KERNEL = {
    "aten::detach", "aten::_unsafe_view", "aten::empty.memory_format", "aten::empty_like", "aten::empty_strided",
    "aten::new_empty", "aten::new_empty_strided", "aten::lift_fresh",
}  # fmt: skip
_SCALAR = "aten::_local_scalar_dense"
_COPY_TO, _COPY_INTO = "aten::_to_copy", "aten::copy_"
_MASKED = {"aten::index.Tensor", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
"""Operations whose second argument is a list of indices, which may be masks."""

Collective = list[Any]
"""The name of the operation, then shape, dtype and kind of device of each of its tensors."""


class Trace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts while it is active; to be entered inside a `FakeTensorMode`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        """Bytes of all CUDA tensors seen so far that are alive."""
        self.peak = 0
        self.peak_operation = ""
        self.kernels: Counter[str] = Counter()
        """Operations on the device by name, without views and allocations."""
        self.copied = 0
        """Bytes copied from host to device."""
        self.waits: Counter[str] = Counter()
        """Points at which the host waits for the device: `FILE:FUNCTION: KIND`."""
        self.mixed: Counter[str] = Counter()
        """Operations on tensors of both host and device, other than copies and scalars."""
        self.collectives: list[Collective] = []
        self._storages: set[int] = set()

    def restart(self) -> None:
        """Forget everything but the tensors that are alive."""
        self.peak, self.peak_operation, self.copied = self.live, "", 0
        for found in (self.kernels, self.waits, self.mixed, self.collectives):
            found.clear()

    def register(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that exist already."""
        for tensor in tensors:
            self._allocated(tensor, "")

    def wait(self, kind: str) -> None:
        """The host waits for the device."""
        self.waits[f"{_caller()}: {kind}"] += 1

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs, name = kwargs or {}, func.name()  # type: ignore[no-untyped-call]
        if name.startswith("prim::"):  # questions about a tensor, such as its device
            return func(*args, **kwargs)
        inputs = list(tensors_in((args, kwargs)))
        on_device = any(tensor.is_cuda for tensor in inputs)
        if name.startswith("c10d::"):
            self.collectives.append([name, *([list(x.shape), str(x.dtype), x.device.type] for x in inputs)])
            return func(*args, **kwargs)
        if name == _SCALAR:
            return self._read(inputs[0])
        if name == "aten::equal" and on_device:
            self.wait("equal")
            return True
        if name == "aten::nonzero" and on_device:
            self.wait("nonzero")
            return inputs[0].new_empty((inputs[0].numel(), inputs[0].dim()), dtype=torch.long)  # the most there can be
        if name in _MASKED:
            args = (args[0], self._without_masks(args[1]), *args[2:])
        if name in (_COPY_TO, _COPY_INTO):
            self._copy(name, args, kwargs)
        elif on_device and any(not tensor.is_cuda and tensor.dim() for tensor in inputs):
            self.mixed[f"{_caller()}: {name}"] += 1
        out = func(*args, **kwargs)
        outputs = list(tensors_in(out))
        for tensor in outputs:
            self._allocated(tensor, name)
        if (on_device or any(tensor.is_cuda for tensor in outputs)) and name not in _NO_KERNEL and not _is_view(func):
            self.kernels[name] += 1
        return out

    def _allocated(self, tensor: Tensor, operation: str) -> None:
        if not tensor.is_cuda:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        size = -(-storage.nbytes() // _BLOCK) * _BLOCK
        self._storages.add(key)
        self.live += size
        weakref.finalize(storage, self._freed, key, size)
        if self.live > self.peak:
            self.peak, self.peak_operation = self.live, operation

    def _freed(self, key: int, size: int) -> None:
        self._storages.discard(key)
        self.live -= size

    def _read(self, tensor: Tensor) -> bool | int | float:
        if tensor.is_cuda:
            self.wait("item")
        if tensor.dtype == torch.bool:
            return False
        return 1.0 if tensor.dtype.is_floating_point else 1

    def _without_masks(self, indices: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Masks as the indices of as many elements as they can choose."""
        found: list[Tensor | None] = []
        for index in indices:
            if index is None or index.dtype not in (torch.bool, torch.uint8):
                found.append(index)
                continue
            if index.is_cuda:
                self.wait("boolean index")
            found += [index.new_empty(index.numel(), dtype=torch.long)] * index.dim()
        return found

    def _copy(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        into = name == _COPY_INTO
        source = args[1] if into else args[0]
        target = args[0].device if into else torch.device(kwargs.get("device") or source.device)
        if source.device.type == target.type:
            return
        asynchronous = args[2] if into and len(args) > 2 else kwargs.get("non_blocking", False)
        if target.type == "cpu":
            self.wait("copy to host")
        else:
            self.copied += source.numel() * source.element_size()
            if not asynchronous:  # CUDA then waits for the stream that the copy is in
                self.wait("blocking copy to device")


def host_waits(kind: str) -> None:
    """Tell the active trace, if there is one, that the host waits here for the device."""
    for mode in _get_current_dispatch_mode_stack():
        if isinstance(mode, Trace):
            mode.wait(kind)


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors_in(part)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


@cache
def _is_view(func: OpOverload) -> bool:
    aliases = (result.alias_info for result in func._schema.returns)
    return any(alias is not None and not alias.is_write for alias in aliases)


def _caller() -> str:
    """The innermost function of the project on the stack, else of a library that it uses, as FILE:FUNCTION."""
    outside = ""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(f"{_PROJECT}/trainer/"):
            return f"{file.removeprefix(f'{_PROJECT}/')}:{frame.f_code.co_name}"
        if not outside and "/site-packages/" in file and "/site-packages/torch/" not in file:
            outside = f"{file.partition('/site-packages/')[2]}:{frame.f_code.co_name}"
        frame = frame.f_back
    return outside or "backward"
