"""Compiles and loads a CUDA device for a CPU build of torch (`cuda_without_gpu.cpp`): only fake tensors can be on it.

The library must be loaded before torch is imported, so this module does not import torch.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("cuda_without_gpu.cpp")
LIBRARY = "libcuda_without_gpu.so"


def missing() -> str:
    """Why this machine cannot compile the library; empty if it can."""
    if _compiler() is None:
        return "no C++ compiler (c++): the CUDA device for fake tensors cannot be compiled"
    if not (_torch() / "include" / "ATen" / "detail" / "CUDAHooksInterface.h").is_file():
        return "torch is installed without its C++ headers"
    return ""


def compile_library(folder: Path) -> Path:
    """Compile the library into `folder`; takes a few seconds.

    Raises:
        RuntimeError: the compiler fails; the message has what it said.
    """
    out, torch = folder / LIBRARY, _torch()
    command = [
        str(_compiler()), "-shared", "-fPIC", "-O1", "-std=c++20", f"-I{torch / 'include'}", str(SOURCE),
        f"-L{torch / 'lib'}", f"-Wl,-rpath,{torch / 'lib'}", "-lc10", "-ltorch_cpu", "-o", str(out),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{SOURCE.name} does not compile against this torch:\n{done.stderr[-3000:]}")
    return out


def load_library(path: Path) -> None:
    """Load it; before torch is imported."""
    ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "c++"))


def _torch() -> Path:
    """The installed package, found without importing it."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent
