"""Gaudi support beyond DeepSpeed's accelerator interface. Follows Habana's documentation; not run on a Gaudi yet.

`PT_HPU_LAZY_MODE` selects how operations run; it is read when habana_frameworks is first imported:

    0  eager; layers under torch.compile as graphs of Habana's backend. The default of current releases
    1  lazy: operations accumulate in a graph until a value is read or `mark_step` is called; no longer developed

Graphs have static shapes: every new shape is a new compilation.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import cache
from typing import Any

log = logging.getLogger(__name__)

FusedAttention = Callable[[Any, Any, Any, Any, float | None], Any]
"""Attention of query, key and value (G, H, length, d) under a mask (G, 1, Q, K), True where a query sees a key, with a
scale (None: 1 / sqrt(d)); returns (G, H, Q, d)."""


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


@cache
def fused_attention() -> FusedAttention | None:
    """Habana's fused attention; None if the installed software has none, in which case torch's keeps all weights.

    The weights of attention are recomputed in the backward pass: kept, they take 34 GB of a step of 3B and 20 users.
    """
    try:
        from habana_frameworks.torch.hpex.kernels import FusedSDPA
    except ImportError as error:
        log.warning(
            "attention: Habana's FusedSDPA cannot be imported (%s); without it attention keeps its weights, which may "
            "take more memory than plan.py says: install the software of Habana's PyTorch image",
            error,
        )
        return None

    def attend(query: Any, key: Any, value: Any, visible: Any, scale: float | None) -> Any:
        no_dropout, not_causal, softmax_mode, recompute = 0.0, False, "None", True
        # By position, because autograd functions take no keywords.
        return FusedSDPA.apply(query, key, value, visible, no_dropout, not_causal, scale, softmax_mode, recompute)

    log.info("attention: using FusedSDPA of habana_frameworks")
    return attend


def memory_gib() -> dict[str, float]:
    """Memory of this rank's device as optimum-habana counts it, in GiB: `in_use` now, and the `limit`."""
    from optimum.habana.utils import get_hpu_memory_stats

    stats = get_hpu_memory_stats()  # its "GB" are 2^30 bytes
    return {"in_use": stats["memory_allocated (GB)"], "limit": stats["total_memory_available (GB)"]}
