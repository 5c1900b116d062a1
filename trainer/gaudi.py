"""What a Gaudi asks beyond DeepSpeed's accelerator interface. After Habana's documentation; not run on one yet.

`PT_HPU_LAZY_MODE` says how operations run, and is read when habana_frameworks is first imported:

    0  one by one; what torch.compile wraps, as graphs of Habana's backend. The default of current releases
    1  they gather into a graph until a value is read or `mark_step` is called; older, no longer developed

All are graphs of fixed shapes: another shape is another compilation.
"""

from __future__ import annotations

import os


def is_lazy() -> bool:
    """Whether operations gather into graphs."""
    return os.environ.get("PT_HPU_LAZY_MODE", "0") == "1"


def set_up(rank: int, local_rank: int, world_size: int) -> None:
    """Once a process, before its first operation: which device it gets, the collectives, static shapes.

    Of what optimum-habana's `GaudiConfig` may turn on, autocast stays off (the frozen LLM has the dtype of
    `system.llm.dtype`, what trains is fp32), Habana's fused optimizer (an AdamW, where the official code has Adam) and
    its clipping (DeepSpeed clips) too.
    """
    # Importing it makes the backend `hccl` known to torch, which DeepSpeed leaves to its user.
    from habana_frameworks.torch.distributed.hccl import initialize_distributed_hpu

    # Tells Habana's library of a launcher that is not its own which of the node's devices is whose.
    initialize_distributed_hpu(world_size=world_size, rank=rank, local_rank=local_rank)
    if is_lazy():
        from habana_frameworks.torch import hpu

        hpu.disable_dynamic_shape()


def mark_step() -> None:
    """In lazy mode, compile and run what has gathered."""
    if is_lazy():
        import habana_frameworks.torch.core as htcore

        htcore.mark_step()


def memory_gib() -> dict[str, float]:
    """Of this rank's device, as optimum-habana counts it: in use now, and all that may be."""
    from optimum.habana.utils import get_hpu_memory_stats

    stats = get_hpu_memory_stats()
    return {"in_use": stats["memory_allocated (GB)"], "limit": stats["total_memory_available (GB)"]}
