"""Count the bytes that a rank sends in each training step of a real run; not a script.

The counter is below DeepSpeed and below our own gathers: it sees every collective that torch passes to the backend. A
collective of N bytes (of the whole tensor) counts as a ring over the n ranks of its group: each sends 2 N (n-1)/n in an
all-reduce, N (n-1)/n in an all-gather, a reduce-scatter or, in the mean of the ranks, a broadcast.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.common.ranks import start_ranks

_TIMES_SENT = {
    "allreduce_": 2, "broadcast_": 1, "_allgather_base_": 1, "allgather_": 1, "allgather_into_tensor_coalesced_": 1,
    "_reduce_scatter_base_": 1, "reduce_scatter_": 1, "reduce_scatter_tensor_coalesced_": 1,
}  # fmt: skip
"""Times that the whole tensor goes around the ring, by operator of `torch.ops.c10d`."""
_SILENT = {"barrier", "monitored_barrier_"}
"""Operators that send no data."""


class CollectiveCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts bytes and calls by operator while it is active."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sent: Counter[str] = Counter()
        """Bytes that this rank sends, by operator."""
        self.calls: Counter[str] = Counter()
        """Calls, by operator."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "c10d":
            name = func.name().split("::")[1].split(".")[0]
            if name not in _SILENT:
                size = _group_size(args)
                self.sent[name] += round(_TIMES_SENT[name] * _whole_bytes(args[:2]) * (size - 1) / size)
                self.calls[name] += 1
        return func(*args, **(kwargs or {}))


def _whole_bytes(arguments: Sequence[Any]) -> int:
    """Bytes of the whole tensor: the larger of a collective's input and output (an all-reduce has one of both)."""
    sides = [[leaf for leaf in tree_leaves(side) if isinstance(leaf, torch.Tensor)] for side in arguments]
    return max(sum(tensor.numel() * tensor.element_size() for tensor in side) for side in sides)


def _group_size(arguments: Sequence[Any]) -> int:
    """Ranks of the process group, the only boxed object among a collective's arguments."""
    boxed = next(argument for argument in arguments if isinstance(argument, torch.ScriptObject))
    return int(dist.ProcessGroup.unbox(boxed).size())


def count_steps(folder: Path, words: list[str], *, ranks: int, steps: int) -> list[dict[str, Any]]:
    """Bytes `sent` and `calls` of rank 0 in each of the first steps of `launchers/train.py WORDS`, by operator of
    `torch.ops.c10d`.

    Raises:
        RuntimeError: the run failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    report = folder / "steps.json"
    started = start_ranks(folder, words, ranks=ranks, prepare=partial(_count, steps, report))
    if started.wait(timeout=1200) != [0] * ranks:
        raise RuntimeError(started.all_said)
    found: list[dict[str, Any]] = json.loads(report.read_text())
    return found


def _count(steps: int, report: Path, rank: int) -> None:
    """Patch the engine so that this process counts its first `steps` steps and then exits."""
    from trainer.engine.engine import Engine

    done: list[dict[str, Any]] = []
    step: Callable[..., Any] = Engine.step

    def counted(engine: Engine[Any, Any], *args: Any, **kwargs: Any) -> Any:
        engine.world.barrier()  # outside the counter: no collective of another step is counted
        with CollectiveCounter() as counter:
            result = step(engine, *args, **kwargs)
        engine.world.barrier()
        done.append({"sent": counter.sent, "calls": counter.calls})
        if len(done) == steps:
            if rank == 0:
                report.write_text(json.dumps(done))
            os._exit(0)
        return result

    Engine.step = counted  # type: ignore[assignment, method-assign]
