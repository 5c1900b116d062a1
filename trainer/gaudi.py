"""Gaudi support beyond DeepSpeed's accelerator interface. Follows Habana's documentation; not run on a Gaudi yet.

`PT_HPU_LAZY_MODE` selects how operations run; it is read when habana_frameworks is first imported:

    0  eager; layers under torch.compile as graphs of Habana's backend. The default of current releases
    1  lazy: operations accumulate in a graph until a value is read or `mark_step` is called; no longer developed

Graphs have static shapes: every new shape is a new compilation.
"""

from __future__ import annotations

import os


def is_lazy() -> bool:
    """Whether operations accumulate in graphs (lazy mode)."""
    return os.environ.get("PT_HPU_LAZY_MODE", "0") == "1"


def set_up(rank: int, local_rank: int, world_size: int) -> None:
    """Assign the device, register collectives and set static shapes: once per process, before its first operation.

    Of the options of optimum-habana's `GaudiConfig` these stay off: autocast (the frozen LLM has the dtype of
    `system.llm.dtype`, trained parameters are fp32), Habana's fused optimizer (an AdamW, where the official code has
    Adam) and its gradient clipping (DeepSpeed clips).
    """
    # The import registers the backend `hccl` with torch, which DeepSpeed leaves to its user.
    from habana_frameworks.torch.distributed.hccl import initialize_distributed_hpu

    # Maps local ranks to the devices of the node, which Habana's library knows only under its own launchers.
    initialize_distributed_hpu(world_size=world_size, rank=rank, local_rank=local_rank)
    if is_lazy():
        from habana_frameworks.torch import hpu

        hpu.disable_dynamic_shape()


def mark_step() -> None:
    """In lazy mode, compile and run the accumulated graph; otherwise a no-op."""
    if is_lazy():
        import habana_frameworks.torch.core as htcore

        htcore.mark_step()


def memory_gib() -> dict[str, float]:
    """Memory of this rank's device as optimum-habana counts it, in GiB: `in_use` now, and the `limit`."""
    from optimum.habana.utils import get_hpu_memory_stats

    stats = get_hpu_memory_stats()  # its "GB" are 2^30 bytes
    return {"in_use": stats["memory_allocated (GB)"], "limit": stats["total_memory_available (GB)"]}
