"""The process group: start and stop, differentiable all-gathers, heartbeat."""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from trainer import gaudi
from trainer.device import keep_freed_memory, on_gaudi
from trainer.runs.launch_env import free_port


class Heartbeat:
    """Current phase and step of this rank, read by the watchdog of `engine/`."""

    def __init__(self) -> None:
        self.step = 0
        self.phase = "start"
        """Phase of the work, such as `epoch`, `validate` or `test`."""
        self.waiting = False
        """Whether the rank is in a collective, where it may be waiting for other ranks."""
        self.since = time.monotonic()
        """Time of the last sign of progress, on the monotonic clock."""

    def at(self, phase: str, step: int | None = None) -> None:
        """Report that the rank has reached `phase`; `step` is unchanged if None."""
        self.phase = phase
        self.step = self.step if step is None else step
        self.since = time.monotonic()

    @contextmanager
    def collective(self) -> Iterator[None]:
        """Context manager around work in which ranks wait for each other."""
        outer = self.waiting
        self.waiting, self.since = True, time.monotonic()
        yield
        self.waiting, self.since = outer, time.monotonic()


@dataclass(frozen=True)
class World:
    """This process among the ranks of a run."""

    rank: int
    size: int
    device: torch.device
    heartbeat: Heartbeat = field(default_factory=Heartbeat, compare=False)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def all_gather_rows(self, local: Tensor, sizes: Sequence[int]) -> Tensor:
        """All-gather rows in rank order, with gradient; a collective. Returns the same (sum(sizes), ...) on every rank.

        Each rank computes the loss of all rows, so the gradient of its own rows is complete without a reduction. It is
        multiplied by the number of ranks because the engine averages gradients over ranks.

        Args:
            local: this rank's rows, (sizes[rank], ...).
            sizes: number of rows of each rank.
        """
        if self.size == 1:
            return local
        with self.heartbeat.collective():
            gathered: Tensor = _GatherRows.apply(local, self.rank, tuple(sizes))  # type: ignore[no-untyped-call]
        return gathered

    def all_gather_value(self, value: float) -> list[float]:
        """All-gather one number per rank, in fp32."""
        if self.size == 1:
            return [value]  # without a device synchronisation
        values: list[float] = self.all_gather_rows(torch.tensor([value], device=self.device), [1] * self.size).tolist()
        return values

    def broadcast_value(self, value: float) -> float:
        """Rank 0's number, on every rank."""
        return self.all_gather_value(value)[0]

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            with self.heartbeat.collective():
                torch.distributed.barrier()


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, rank: int, sizes: tuple[int, ...]) -> Tensor:
        ctx.rows = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        ctx.world_size = len(sizes)
        # all_gather needs equal shapes, and shares of a batch may differ by a row.
        padded = local.new_zeros((max(sizes), *local.shape[1:]))
        padded[: len(local)] = local
        parts = [torch.empty_like(padded) for _ in sizes]
        torch.distributed.all_gather(parts, padded.contiguous())
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0][ctx.rows] * ctx.world_size, None, None


def start(threads: int = 0, timeout: timedelta = timedelta(minutes=30)) -> World:
    """Join the run's process group, or create a group of one if no launcher started this process.

    Args:
        threads: CPU threads for this rank; 0 divides the machine's cores among its ranks.
        timeout: time-out of one collective, after which the collective library aborts it.

    Raises:
        ConnectionError: the rendezvous port is taken or cannot be reached.
    """
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    if not torch.cuda.is_available() and importlib.util.find_spec("habana_frameworks") is None:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # as DeepSpeed would detect itself, but with a warning
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if accelerator.device_name() == "cpu":
        # Otherwise the first start compiles an extension for minutes, and a killed compilation leaves a lock that later
        # runs wait for.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        cores = len(os.sched_getaffinity(0))
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
        torch.set_num_threads(threads or max(1, cores // ranks_here))
        keep_freed_memory()
        device = torch.device("cpu")
    else:
        if on_gaudi():
            gaudi.set_up(int(os.environ["RANK"]), local_rank, int(os.environ["WORLD_SIZE"]))
        accelerator.set_device(local_rank)
        device = torch.device(accelerator.device_name(local_rank))
    if not torch.distributed.is_initialized():
        try:
            deepspeed.init_distributed(
                dist_backend=accelerator.communication_backend_name(), timeout=timeout, verbose=False
            )
        except torch.distributed.DistNetworkError as error:
            address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise ConnectionError(
                f"the ranks cannot connect at {address} ({str(error).splitlines()[0]}): if another run uses that port, "
                "start with `deepspeed --master_port N`, or set MASTER_PORT"
            ) from error
    return World(torch.distributed.get_rank(), torch.distributed.get_world_size(), device)


def stop() -> None:
    """Leave the process group, so that the process ends without a warning."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
