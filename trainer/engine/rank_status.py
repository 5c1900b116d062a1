"""Per-rank status, exchanged once per step, after backward and before the optimizer step.

One all-gather of a few numbers per rank: its loss and gradient norm (to check that they are finite), its stop signal,
the seconds of its own work, whether a checkpoint is due, and what else of the step is reported. Reading them is the one
point of a step where the host waits for the device (DeepSpeed's ZeRO adds its own, see `docs/one_step.md`).

Letters: R ranks, X numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.distributed import World


class NonFiniteError(RuntimeError):
    """The loss or the gradient is NaN or infinite."""


@dataclass(frozen=True)
class RankStatus:
    """Status that a rank reports to all ranks."""

    signal: int = 0
    """Number of the stop signal that it received; 0 for none."""
    busy_seconds: float = 0.0
    """Duration of its data loading and forward pass in the previous step, without waiting for other ranks."""
    save_due: bool = False
    """Whether, by its clock, a checkpoint is due after this step."""


class StepStatus(NamedTuple):
    """One rank's loss, gradient norm and status in one step."""

    loss: float
    grad_norm: float
    """Norm of the rank's own gradient, before averaging over ranks."""
    status: RankStatus
    also: tuple[float, ...] = ()
    """See `exchange`."""


def exchange(
    world: World, loss: Tensor, grad_norm: Tensor, status: RankStatus, also: Sequence[Tensor] = ()
) -> list[StepStatus]:
    """All-gather the status of all ranks, in rank order; every rank calls it and gets the same list.

    Args:
        also: further scalars on the device, to be read at the same time; the same number of them on every rank.
    """
    own = torch.tensor([float(status.signal), status.busy_seconds, float(status.save_due)])
    # Without `non_blocking` the copy of these 12 bytes would wait for the backward pass.
    parts = [own.to(world.device, non_blocking=True)]
    parts += [scalar.detach().float().view(1) for scalar in (loss, grad_norm, *also)]
    with world.heartbeat.collective():
        row_RX = world.all_gather_rows(torch.cat(parts).unsqueeze(0), [1] * world.size).tolist()
    return [
        StepStatus(loss, norm, RankStatus(int(signal), busy, bool(due)), tuple(more))
        for signal, busy, due, loss, norm, *more in row_RX
    ]


def check_finite(step_R: Sequence[StepStatus], parts: Mapping[str, float]) -> None:
    """Reject a step that would corrupt the parameters.

    Raises:
        NonFiniteError: on every rank alike.
    """
    for rank, step in enumerate(step_R):
        if not math.isfinite(step.loss):
            shown = ", ".join(f"{name}={part:g}" for name, part in parts.items())
            raise NonFiniteError(f"the loss is {step.loss:g} ({shown})")
        if not math.isfinite(step.grad_norm):
            raise NonFiniteError(f"the gradient norm on rank {rank} is {step.grad_norm:g}")
