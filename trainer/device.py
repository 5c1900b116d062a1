"""The accelerator of this process: memory, timing, compilation.

Only this module, `distributed.py`, `gaudi.py` and `engine/` know of accelerators. DeepSpeed's accelerator interface
covers CUDA, HPU and CPU; `DS_ACCELERATOR` overrides its choice.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch

from trainer import gaudi
from trainer.config import ConfigError

FusedAttention = gaudi.FusedAttention

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Parameters of `mallopt`, from glibc's malloc.h."""
_DRIVER_FILE = Path("/proc/driver/nvidia/version")


def keep_freed_memory() -> None:
    """Let glibc reuse freed memory for the next tensors instead of returning it to the kernel.

    By default glibc allocates each large tensor by mmap and unmaps it when it is freed, so that the kernel has to map
    and zero new pages in every step. No effect without glibc.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(_M_MMAP_THRESHOLD, 2**31 - 1)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)  # never trim


class HeapTrimmer:
    """Bounds what `keep_freed_memory` costs: batches differ in length, and the holes that their tensors leave in the
    heap fit no other tensor, so that it grows with every step.

    Gives freed memory back whenever the process has grown by half since the step after the last time, which costs one
    step new pages.
    """

    _GROWTH = 1.5

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None)
        self._enabled = sys.platform == "linux" and hasattr(self._libc, "malloc_trim")
        self._settled: int | None = None

    def after_step(self) -> None:
        """Call after every step; reads one small file."""
        if not self._enabled:
            return
        resident = _resident_pages()
        if self._settled is None:
            self._settled = resident
        elif resident > self._GROWTH * self._settled:
            self._libc.malloc_trim(0)
            self._settled = None  # measured after the next step, with the memory that a step needs


def _resident_pages() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1])


def use_deterministic_algorithms() -> None:
    """Choose deterministic algorithms in this process, before its first operation on the device.

    An operation without a deterministic algorithm then raises a RuntimeError that names it.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # otherwise cuBLAS may differ between streams
    torch.use_deterministic_algorithms(True)
    settings: Any = torch.utils.deterministic
    settings.fill_uninitialized_memory = False  # nothing here reads such memory, and filling it takes time


class Stopwatch:
    """Measures the seconds between `start` and `stop`.

    An accelerator runs asynchronously, so there it records device events, which needs no synchronisation.
    """

    def __init__(self) -> None:
        from deepspeed.accelerator import get_accelerator

        accelerator = get_accelerator()
        self._event = None if accelerator.device_name() == "cpu" else accelerator.Event
        self._marks: list[Any] = []

    def start(self) -> None:
        """Mark the beginning; discards an earlier measurement."""
        self._marks = [self._mark()]

    def stop(self) -> None:
        """Mark the end."""
        self._marks.append(self._mark())

    def seconds(self) -> float:
        """Seconds between start and stop; the device must have been synchronised since."""
        first, last = self._marks
        return last - first if self._event is None else float(first.elapsed_time(last)) / 1000.0

    def _mark(self) -> Any:
        if self._event is None:
            return time.perf_counter()
        event = self._event(enable_timing=True)
        event.record()
        return event


def check_accelerator() -> None:
    """Check that ranks would run on the device that torch was installed for, not silently on the CPU.

    `DS_ACCELERATOR=cpu` chooses the CPU on purpose. Without an NVIDIA driver, as on a laptop, and outside Slurm jobs
    the CPU is used too, since pip installs torch for CUDA there as well.

    Raises:
        ConfigError: torch is built for CUDA and finds no usable GPU where one is to be expected, or
            `DS_ACCELERATOR=cuda` and torch has no CUDA.
    """
    chosen = os.environ.get("DS_ACCELERATOR", "")
    if chosen not in ("", "cuda") or torch.cuda.is_available():
        return
    on_purpose = "to train on the CPU on purpose, set DS_ACCELERATOR=cpu"
    expected = chosen == "cuda" or nvidia_driver() or "SLURM_JOB_ID" in os.environ
    if torch.version.cuda and expected:
        raise ConfigError(
            f"torch {torch.__version__} is built for CUDA {torch.version.cuda} and finds no usable GPU "
            f"({_why_no_cuda()}; driver: {nvidia_driver() or 'none'}): install the torch of the CUDA index that fits "
            f"the driver (docs/clusters.md), or ask for a GPU if this is a job; {on_purpose}"
        )
    if chosen == "cuda":
        raise ConfigError(
            f"DS_ACCELERATOR=cuda, but torch {torch.__version__} is built without CUDA: install the torch of a CUDA "
            f"index (docs/clusters.md); {on_purpose}"
        )


def _why_no_cuda() -> str:
    """First sentence of torch's reason, such as a driver that is too old."""
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        return " ".join(str(error).split()).split(". ")[0]
    return "torch.cuda.is_available() is false"


def nvidia_driver() -> str:
    """Version of the NVIDIA kernel driver, such as 535.161.08; empty without one."""
    if not _DRIVER_FILE.is_file():
        return ""
    found = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)\s", _DRIVER_FILE.read_text())
    return found.group(1) if found else ""


def describe_software() -> str:
    """The device with the versions of torch, CUDA and the driver, for the log."""
    cuda = f", CUDA {torch.version.cuda}, driver {nvidia_driver() or 'unknown'}" if accelerator() == "cuda" else ""
    return f"{describe()}, torch {torch.__version__}{cuda}"


def wait_for_device() -> None:
    """Wait until the accelerator has done all that was enqueued; returns at once on a CPU."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().synchronize()


def describe() -> str:
    """Human-readable name of the device, for results."""
    name = accelerator()
    if name == "cuda":
        return torch.cuda.get_device_name()
    return f"{name} ({os.cpu_count()} cores)" if name == "cpu" else name


def rounding() -> str:
    """The accelerator, or the processor and the number of threads: results on equal ones round alike."""
    if accelerator() != "cpu":
        return describe()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{name} ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} thread(s)"


def mark_step() -> None:
    """Mark the end of a pass, an optimizer step or a batch; a no-op except on a Gaudi in lazy mode.

    That runs the accumulated graph here, so that the next pass, step or batch accumulates the same graph again.
    """
    if on_gaudi():
        gaudi.mark_step()


def accelerator() -> str:
    """DeepSpeed's name of the accelerator: `cuda`, `hpu` or `cpu`."""
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return "cpu"  # without importing DeepSpeed, which recommending does not need
    from deepspeed.accelerator import get_accelerator

    return str(get_accelerator().device_name())


def pins_memory() -> bool:
    """Whether batches should be in page-locked memory, so that the device copies them while it computes."""
    return accelerator() == "cuda"


def graph_backend() -> str | None:
    """Backend of torch.compile for layers with static shapes; None where layers are not compiled."""
    from deepspeed.accelerator import get_accelerator

    return str(get_accelerator().get_compile_backend()) if on_gaudi() and not gaudi.is_lazy() else None


def fused_attention() -> FusedAttention | None:
    """The device's own kernel for masked attention; None where torch's is used."""
    return gaudi.fused_attention() if on_gaudi() else None


def memory_gib() -> dict[str, float]:
    """Memory in GiB: `peak`, and on Gaudi also `in_use` and `limit`."""
    return {"peak": peak_memory_bytes() / 2**30} | (gaudi.memory_gib() if on_gaudi() else {})


def on_cuda() -> bool:
    """Whether this process runs on a CUDA device."""
    # Answers without importing DeepSpeed, which takes seconds.
    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"


def on_gaudi() -> bool:
    """Whether this process runs on a Gaudi."""
    if "habana_frameworks" not in sys.modules:
        return False  # answers without importing DeepSpeed, which evaluation does not need
    from deepspeed.accelerator import get_accelerator

    return bool(get_accelerator().device_name() == "hpu")


def float64_device(device: torch.device) -> torch.device:
    """The device itself, or the CPU for Gaudi, which does not compute in float64."""
    return torch.device("cpu") if device.type == "hpu" else device


def peak_memory_bytes() -> int:
    """Peak memory of this rank in bytes: allocated on the accelerator, or resident in the process on a CPU."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB on Linux
    return int(accelerator.max_memory_allocated())
