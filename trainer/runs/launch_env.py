"""Environment variables that launchers set, and free ports; torch-free."""

from __future__ import annotations

import os
import socket


def free_port() -> int:
    """A TCP port that is free on localhost at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def set_library_defaults() -> None:
    """Set what torch and NCCL read from the environment, where the user has not; before torch is imported."""
    if "PYTORCH_ALLOC_CONF" not in os.environ:  # the newer name of the same setting
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # batches differ in length
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")  # collectives that NCCL's flight recorder keeps


def launched_world_size() -> int:
    """Number of processes that the launcher started; 1 without a launcher.

    Raises:
        ValueError: the launcher's environment is incomplete, so that the ranks would wait for each other forever.
    """
    if "RANK" not in os.environ:
        return 1
    missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise ValueError(f"RANK is set but {missing[0]} is not: start with `deepspeed`, or unset RANK")
    return int(os.environ["WORLD_SIZE"])
