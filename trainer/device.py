"""The accelerator and the group of ranks: one of the two places (with `engine/`) that know of either.

DeepSpeed's accelerator interface covers CUDA, HPU and CPU; `DS_ACCELERATOR` overrides its choice.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from typing import Any

import torch

from trainer import gaudi

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Of glibc's malloc.h."""


def keep_freed_memory() -> None:
    """Let glibc keep what this process frees for its next tensors.

    By itself it returns each large tensor to the kernel, which then gives out new pages and fills them with zeros, in
    every step anew. Without glibc nothing changes.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(_M_MMAP_THRESHOLD, 2**31 - 1)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)  # never


class Stopwatch:
    """Seconds of work between two places in a program.

    An accelerator runs behind the host, so there the device's own events are used: no waiting for it.
    """

    def __init__(self) -> None:
        from deepspeed.accelerator import get_accelerator

        accelerator = get_accelerator()
        self._event = None if accelerator.device_name() == "cpu" else accelerator.Event
        self._marks: list[Any] = []

    def start(self) -> None:
        self._marks = [self._mark()]

    def stop(self) -> None:
        self._marks.append(self._mark())

    def seconds(self) -> float:
        """Between start and stop; the device must have been waited for since."""
        first, last = self._marks
        return last - first if self._event is None else float(first.elapsed_time(last)) / 1000.0

    def _mark(self) -> Any:
        if self._event is None:
            return time.perf_counter()
        event = self._event(enable_timing=True)
        event.record()
        return event


def describe() -> str:
    """The device as a person would name it, for results."""
    from deepspeed.accelerator import get_accelerator

    name = get_accelerator().device_name()
    if name == "cuda":
        return torch.cuda.get_device_name()
    return f"{name} ({os.cpu_count()} cores)" if name == "cpu" else str(name)


def mark_step() -> None:
    """Where a pass, an optimizer step or a batch ends: devices that gather operations (a Gaudi in lazy mode) run them
    here, so that the next one gathers the same graph."""
    if on_gaudi():
        gaudi.mark_step()


def accelerator() -> str:
    """What the ranks run on, as DeepSpeed names it: `cuda`, `hpu` or `cpu`."""
    from deepspeed.accelerator import get_accelerator

    return str(get_accelerator().device_name())


def graph_backend() -> str | None:
    """The backend of torch.compile for layers whose shapes stay the same; None where they run as they are."""
    from deepspeed.accelerator import get_accelerator

    return str(get_accelerator().get_compile_backend()) if on_gaudi() and not gaudi.is_lazy() else None


def memory_gib() -> dict[str, float]:
    """`peak` and, of devices that tell, what is in use and the limit."""
    return {"peak": peak_memory_bytes() / 2**30} | (gaudi.memory_gib() if on_gaudi() else {})


def on_gaudi() -> bool:
    if "habana_frameworks" not in sys.modules:
        return False  # without importing DeepSpeed, which the evaluation does not need
    from deepspeed.accelerator import get_accelerator

    return bool(get_accelerator().device_name() == "hpu")


def peak_memory_bytes() -> int:
    """The most memory this rank has held: of the accelerator, or of the process on a CPU."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(accelerator.max_memory_allocated())
