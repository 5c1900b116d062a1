"""The process group: start and stop, differentiable all-gathers, heartbeat."""

from __future__ import annotations

import importlib.util
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from trainer import gaudi
from trainer.config import ConfigError
from trainer.device import check_accelerator, keep_freed_memory, on_cuda, on_gaudi, wait_for_device
from trainer.runs.launch_env import free_port

_PATIENCE = timedelta(seconds=120)
"""For all ranks to meet, and for their first collective."""
_COLLECTIVE_CURES = {
    "nccl": "where nodes have several networks, set NCCL_SOCKET_IFNAME to the one between them (`ip -brief address`); "
    "within a node, set NCCL_P2P_DISABLE=1, for boards whose IOMMU or PCIe ACS breaks copies between GPUs; "
    "NCCL_DEBUG=INFO shows what NCCL chose",
    "hccl": "where nodes have several networks, set HCCL_SOCKET_IFNAME to the one between them (`ip -brief address`)",
    "gloo": "where nodes have several networks, set GLOO_SOCKET_IFNAME to the one between them (`ip -brief address`)",
}
_GROUP_OF_ONE = "LLM_SREC_GROUP_OF_ONE"
"""Environment variable: process and port of a group that a process without a launcher made for itself."""


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
        with self.heartbeat.collective():
            own = torch.tensor([value], device=self.device)
            values: list[float] = self.all_gather_rows(own, [1] * self.size).tolist()
        return values

    def all_gather_results(self, local: Tensor, sizes: Sequence[int]) -> Tensor:
        """`all_gather_rows` without gradient, which returns once the rows have arrived.

        An accelerator only enqueues a gather: the host would wait for slower ranks at the next value that it reads,
        where the watchdog would take this rank for the one that is stuck.
        """
        with torch.no_grad(), self.heartbeat.collective():
            rows = self.all_gather_rows(local, sizes)
            if self.size > 1:
                wait_for_device()
        return rows

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


def _of_parent() -> bool:
    """Whether the environment describes the group of one of a parent process, such as a notebook that has trained.

    Commands that it starts inherit the variables, and its port is taken. A launcher in between sets a port of its own.
    """
    owner, _, port = os.environ.get(_GROUP_OF_ONE, "").partition(":")
    return bool(owner) and owner != str(os.getpid()) and port == os.environ.get("MASTER_PORT")


def _asked_threads() -> int:
    """OMP_NUM_THREADS, 0 without it; of a list, which is for nested parallelism, the first number."""
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return int(first) if first.isdecimal() else 0


def start(threads: int = 0, timeout: timedelta = timedelta(minutes=30)) -> World:
    """Join the run's process group, or create a group of one if no launcher started this process.

    Args:
        threads: CPU threads for this rank; 0: OMP_NUM_THREADS, or without it this machine's cores divided by its ranks.
        timeout: time-out of one collective, after which the collective library aborts it.

    Raises:
        ConfigError: torch is built for CUDA and finds no usable GPU.
        ConnectionError: the rendezvous port is taken or cannot be reached, a rank is missing, or the first collective
            does not return.
    """
    habana = importlib.util.find_spec("habana_frameworks") is not None
    if not habana:
        check_accelerator()
    if "RANK" not in os.environ or _of_parent():
        port = str(free_port())
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
        os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, _GROUP_OF_ONE: f"{os.getpid()}:{port}"})
    if not torch.cuda.is_available() and not habana:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # as DeepSpeed would detect itself, but with a warning
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    cores = len(os.sched_getaffinity(0))
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    torch.set_num_threads(threads or _asked_threads() or max(1, cores // ranks_here))
    if accelerator.device_name() == "cpu":
        # Otherwise the first start compiles an extension for minutes, and a killed compilation leaves a lock that later
        # runs wait for.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        keep_freed_memory()
        device = torch.device("cpu")
    else:
        if on_gaudi():
            gaudi.set_up(int(os.environ["RANK"]), local_rank, int(os.environ["WORLD_SIZE"]))
        else:
            local_rank = _device_index(local_rank, accelerator.device_count())
            os.environ["LOCAL_RANK"] = str(local_rank)  # where DeepSpeed reads the device
        accelerator.set_device(local_rank)
        device = torch.device(accelerator.device_name(local_rank))
    if not torch.distributed.is_initialized():
        _meet(accelerator.communication_backend_name(), timeout)
        deepspeed.init_distributed(dist_backend=accelerator.communication_backend_name(), verbose=False)
        if torch.distributed.get_world_size() > 1:
            _try_collective(device, _PATIENCE)
    return World(torch.distributed.get_rank(), torch.distributed.get_world_size(), device)


def alone(threads: int = 0) -> World:
    """This process as the only rank, without a process group: enough for a model that answers and does not train.

    On a CPU or a GPU that leaves out DeepSpeed, whose import takes longer than a recommendation.

    Args:
        threads: CPU threads; 0: OMP_NUM_THREADS, or without it the cores of this machine.

    Raises:
        ConfigError: torch is built for CUDA and finds no usable GPU.
    """
    if importlib.util.find_spec("habana_frameworks") is not None:
        return start(threads)
    check_accelerator()
    torch.set_num_threads(threads or _asked_threads() or len(os.sched_getaffinity(0)))
    if on_cuda():
        return World(0, 1, torch.device("cuda", torch.cuda.current_device()))
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return World(0, 1, torch.device("cpu"))


def _device_index(local_rank: int, devices: int) -> int:
    """Which of the visible GPUs a rank uses: that of its local rank, or the only one where a site binds one per task.

    Raises:
        ConfigError: the node has more ranks than GPUs.
    """
    if local_rank < devices:
        return local_rank
    if devices == 1:
        return 0
    raise ConfigError(
        f"local rank {local_rank} sees {devices} GPUs: start at most {devices} ranks per node (`deepspeed --num_gpus "
        f"{devices}`, or --per-node {devices} of submit.py)"
    )


def _meet(backend: str, timeout: timedelta) -> None:
    """Start torch's process group, waiting `_PATIENCE` for the other ranks rather than the time-out of collectives."""
    try:
        store, rank, size = next(rendezvous("env://", timeout=_PATIENCE))
    except torch.distributed.DistError as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise ConnectionError(
            f"the ranks cannot connect at {address} ({str(error).splitlines()[0]}): if another run uses that port, "
            "start with `deepspeed --master_port N`, or set MASTER_PORT; if not, a rank did not start within "
            f"{_PATIENCE.total_seconds():.0f} s, or a firewall is between the nodes"
        ) from error
    store.set_timeout(timeout)
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)


def _try_collective(device: torch.device, patience: timedelta) -> None:
    """All-reduce one number, in a thread: a collective library that cannot connect blocks inside its first collective.

    Raises:
        ConnectionError: it did not return in time, or failed; the message names the settings that may cure it.
    """
    failed: list[Exception] = []

    def reduce() -> None:
        try:
            one = torch.ones(1, device=device)
            torch.distributed.all_reduce(one)
            one.tolist()  # an accelerator only enqueues the collective
        except RuntimeError as error:
            failed.append(error)

    thread = threading.Thread(target=reduce, name="first collective", daemon=True)
    thread.start()
    thread.join(patience.total_seconds())
    if thread.is_alive() or failed:
        backend = torch.distributed.get_backend()
        reason = str(failed[0]).splitlines()[0] if failed else f"no answer in {patience.total_seconds():.0f} s"
        raise ConnectionError(
            f"the ranks have met, but their first all-reduce over {backend} failed ({reason}): "
            f"{_COLLECTIVE_CURES.get(backend, _COLLECTIVE_CURES['gloo'])}"
        )


def stop() -> None:
    """Leave the process group, so that the process ends without a warning."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
