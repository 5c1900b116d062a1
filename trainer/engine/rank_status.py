"""What the ranks tell each other once a step, after backward and before the optimizer moves anything.

One all-gather of a row of five numbers a rank: whether its loss and gradient are finite, whether it was asked to stop,
how long its own work took, whether a checkpoint is due. It waits for the device once, in place of the wait for the loss
that a check needs anyway.

Letters: R ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from trainer.distributed import World


class NonFiniteError(RuntimeError):
    """The loss or the gradient is NaN or infinite."""


@dataclass(frozen=True)
class RankStatus:
    """What a rank says of itself."""

    signal: int = 0
    """Number of the stop signal it got; 0 for none."""
    busy_seconds: float = 0.0
    """What it needed for its own data and forward pass in the step before, without waiting for others."""
    save_due: bool = False
    """By its clock a checkpoint is due after this step."""


class StepStatus(NamedTuple):
    """One rank in one step."""

    loss: float
    grad_norm: float
    """Of its own gradient, before ranks are averaged."""
    status: RankStatus


class LocalGradNorm:
    """The norm of this rank's own gradients, taken on their way into the parameters.

    ZeRO averages and partitions gradients during backward and computes their norm in the optimizer step, when it is
    too late to refuse. Hooks on the parameters see them earlier, at every stage. Where the norm of each rank is finite
    so is that of the average.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], device: torch.device) -> None:
        self._square = torch.zeros((), device=device)
        for parameter in parameters:
            parameter.register_hook(self._add)  # type: ignore[no-untyped-call]

    def reset(self) -> None:
        """Begin a step."""
        self._square = torch.zeros_like(self._square)

    def value(self) -> Tensor:
        """Root of the sum of squares since the last reset; on the device."""
        return self._square.sqrt()

    def _add(self, gradient: Tensor) -> None:
        self._square = self._square + torch.linalg.vector_norm(gradient.detach().float()).square()


def exchange(world: World, loss: Tensor, grad_norm: Tensor, status: RankStatus) -> list[StepStatus]:
    """The vitals of all ranks; every rank calls it and gets the same."""
    own = torch.tensor([float(status.signal), status.busy_seconds, float(status.save_due)], device=world.device)
    row_15 = torch.cat([loss.detach().float().view(1), grad_norm.view(1), own]).unsqueeze(0)
    with world.heartbeat.collective():
        row_R5 = world.gather_rows(row_15, [1] * world.size).tolist()
    return [
        StepStatus(loss, norm, RankStatus(int(signal), busy, bool(due))) for loss, norm, signal, busy, due in row_R5
    ]


def check_finite(step_R: Sequence[StepStatus], parts: Mapping[str, Tensor]) -> None:
    """Refuse a step that would spoil the parameters.

    Raises:
        NonFiniteError: on every rank alike.
    """
    for rank, step in enumerate(step_R):
        if not math.isfinite(step.loss):
            shown = ", ".join(f"{name}={float(part):g}" for name, part in parts.items())
            raise NonFiniteError(f"the loss is {step.loss:g} ({shown})")
        if not math.isfinite(step.grad_norm):
            raise NonFiniteError(f"the norm of the gradient on rank {rank} is {step.grad_norm:g}")
