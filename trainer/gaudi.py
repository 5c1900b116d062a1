"""What a Gaudi asks beyond DeepSpeed's accelerator interface. After Habana's documentation; not run on one yet.

`PT_HPU_LAZY_MODE` says how operations run, and is read when habana_frameworks is first imported:

    0  one by one; what torch.compile wraps, as graphs of Habana's backend. The default of current releases
    1  they gather into a graph until a value is read or `mark_step` is called; older, no longer developed

All are graphs of fixed shapes: another shape is another compilation.
"""

from __future__ import annotations

import os

OF_GAUDI_TRAINER = {
    # The frozen LLM has the dtype of `system.llm.dtype`, what trains is fp32: nothing is left to cast.
    "use_torch_autocast": False,
    # Habana's is an AdamW; ours is the official code's Adam, whose moments a checkpoint holds by name.
    "use_fused_adam": False,
    # DeepSpeed clips.
    "use_fused_clip_norm": False,
    "use_dynamic_shapes": False,
}
"""The settings of optimum-habana's `GaudiConfig`, as this trainer has them."""


def is_lazy() -> bool:
    """Whether operations gather into graphs."""
    return os.environ.get("PT_HPU_LAZY_MODE", "0") == "1"


def set_up(rank: int, local_rank: int, world_size: int) -> None:
    """Once a process, before its first operation: which device it gets, the collectives, and what GaudiTrainer does for
    its settings."""
    # Importing it makes the backend `hccl` known to torch, which DeepSpeed leaves to its user.
    from habana_frameworks.torch.distributed.hccl import initialize_distributed_hpu

    # Tells Habana's library of a launcher that is not its own which of the node's devices is whose.
    initialize_distributed_hpu(world_size=world_size, rank=rank, local_rank=local_rank)
    if is_lazy():
        from habana_frameworks.torch import hpu
        from optimum.habana import GaudiConfig

        dynamic = GaudiConfig(**OF_GAUDI_TRAINER).use_dynamic_shapes
        (hpu.enable_dynamic_shape if dynamic else hpu.disable_dynamic_shape)()


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
