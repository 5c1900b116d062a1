"""Per-rank status, exchanged once per step, after backward and before the optimizer step.

One all-gather of five numbers per rank: its loss and gradient norm (to check that they are finite), its stop signal,
the seconds of its own work, and whether a checkpoint is due. It costs one host sync, which the check of the loss would
need anyway.

Letters: R ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor, nn

from trainer.distributed import World


class NonFiniteError(RuntimeError):
    """The loss, the gradient or a trained weight is NaN or infinite.

    Args:
        ranks: ranks at fault; empty if it is on all of them, or unknown.
    """

    def __init__(self, reason: str, ranks: Sequence[int] = ()) -> None:
        super().__init__(reason)
        self.ranks = tuple(ranks)


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


class LocalGradNorm:
    """Norm of this rank's own gradients, accumulated by hooks on the parameters during backward.

    ZeRO averages and partitions gradients during backward and computes their norm in the optimizer step, when it is too
    late to skip that step. Hooks see the gradients earlier, at every ZeRO stage. If the norm on every rank is finite,
    so is that of the average.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], device: torch.device) -> None:
        self._square = torch.zeros((), device=device)
        for parameter in parameters:
            parameter.register_hook(self._add)  # type: ignore[no-untyped-call]

    def reset(self) -> None:
        """Start a new step."""
        self._square = torch.zeros_like(self._square)

    def value(self) -> Tensor:
        """L2 norm over all gradients since the last reset; a scalar on the device."""
        return self._square.sqrt()

    def _add(self, gradient: Tensor) -> None:
        self._square = self._square + torch.linalg.vector_norm(gradient.detach().float()).square()


def exchange(world: World, loss: Tensor, grad_norm: Tensor, status: RankStatus) -> list[StepStatus]:
    """All-gather the status of all ranks, in rank order; every rank calls it and gets the same list."""
    own = torch.tensor([float(status.signal), status.busy_seconds, float(status.save_due)], device=world.device)
    row_15 = torch.cat([loss.detach().float().view(1), grad_norm.view(1), own]).unsqueeze(0)
    with world.heartbeat.collective():
        row_R5 = world.all_gather_rows(row_15, [1] * world.size).tolist()
    return [
        StepStatus(loss, norm, RankStatus(int(signal), busy, bool(due))) for loss, norm, signal, busy, due in row_R5
    ]


def check_finite(
    step_R: Sequence[StepStatus], parts: Mapping[str, Tensor], terms: Sequence[Tensor], sizes: Sequence[int]
) -> None:
    """Reject a step that would corrupt the parameters.

    Args:
        parts: of the loss.
        terms: the terms of the global batch, in rank order; only read if the loss is not finite.
        sizes: rows of each rank in them.

    Raises:
        NonFiniteError: on every rank alike. It names the ranks whose terms are not finite, unless all ranks' are.
    """
    if wrong := [step.loss for step in step_R if not math.isfinite(step.loss)]:
        ranks = _ranks_not_finite(step_R, terms, sizes)
        shown = ", ".join(f"{name}={float(part):g}" for name, part in parts.items())
        raise NonFiniteError(f"the loss{in_words(ranks)} is {wrong[0]:g} ({shown})", ranks)
    if wrong := [step.grad_norm for step in step_R if not math.isfinite(step.grad_norm)]:
        ranks = ranks_that_differ([math.isfinite(step.grad_norm) for step in step_R])
        raise NonFiniteError(f"the gradient norm{in_words(ranks)} is {wrong[0]:g}", ranks)


def ranks_that_differ(finite_R: Sequence[bool]) -> list[int]:
    """Ranks where something is not finite; none if it is so on every rank."""
    return [rank for rank, finite in enumerate(finite_R) if not finite] if any(finite_R) else []


def in_words(ranks: Sequence[int]) -> str:
    """` on rank 1`, or ` on ranks 0, 3`; empty for no rank."""
    return f" on rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}" if ranks else ""


def _ranks_not_finite(step_R: Sequence[StepStatus], terms: Sequence[Tensor], sizes: Sequence[int]) -> list[int]:
    """Ranks at fault for a loss of the global batch: those whose rows of the terms are not finite, or, as all ranks
    compute the loss from the same terms, those that got another loss from them."""
    ends = list(accumulate(sizes))
    rows_R = [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]
    finite_R = [all(bool(term[rows].isfinite().all()) for term in terms) for rows in rows_R]
    return ranks_that_differ(finite_R) or ranks_that_differ([math.isfinite(step.loss) for step in step_R])
