"""Per-rank status, exchanged once per step, after backward and before the optimizer step.

One all-gather of a few numbers per rank: its loss and gradient norm (to check that they are finite), its stop signal,
the seconds of its own work, whether a checkpoint is due, and what else of the step is reported. Reading them is the one
point of a step where the host waits for the device (DeepSpeed's ZeRO adds its own, see `docs/one_step.md`).

Letters: R ranks, X numbers, G parameter groups.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trainer.config.deepspeed_json import zero_stage
from trainer.distributed import World

_NEED_THE_NORM = {"offload_optimizer", "zenflow"}
"""Keys of `zero_optimization` with which DeepSpeed always computes the norm itself."""


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
    also: tuple[float, ...] = ()
    """See `exchange`."""


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


class AveragedGradNorm:
    """Norm of the averaged gradient, the one that the optimizer steps along.

    DeepSpeed computes it inside its optimizer step, and tests there whether it is finite: the host waits twice. Where
    nothing else needs it (no clipping), ZeRO 1 and 2 leave it out, and it is computed here, before the step, from the
    gradients that DeepSpeed has averaged and partitioned. It is then read with the status of the ranks, at no wait.
    Otherwise, and under ZeRO-3, it is DeepSpeed's.

    Args:
        settings: DeepSpeed's configuration; changed in place before `deepspeed.initialize` reads it.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], settings: dict[str, Any], device: torch.device) -> None:
        self._parameters = list(parameters)
        self._device = device
        # As DeepSpeed computes it, to the last bit; Gaudi has no float64.
        self._dtype = torch.float32 if device.type == "hpu" else torch.float64
        self._stage = zero_stage(settings)
        zero = settings.get("zero_optimization", {})
        self._partitioned = (
            self._stage in (1, 2) and not settings["gradient_clipping"] and not _NEED_THE_NORM & zero.keys()
        )
        if self._partitioned:
            zero["compute_grad_norm"] = False

    def scalars(self, optimizer: Any) -> list[Tensor]:
        """Scalars that `value` needs from every rank; call it between the backward pass and the optimizer step.

        Without ZeRO the norm. Else the squared norm of this rank's partition of each parameter group; none where
        DeepSpeed computes the norm.
        """
        if self._stage == 0:  # every rank holds the whole gradient
            return [torch.nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])]
        if not self._partitioned:
            return []
        found = []
        for gradients in optimizer.averaged_gradients.values():
            # The last rank's partition ends in padding.
            real = [gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False)]
            norms = [torch.linalg.vector_norm(gradient, dtype=self._dtype) for gradient in real]
            found.append(torch.stack(norms or [torch.zeros((), device=self._device)]).square().sum())
        return found

    def value(self, scalar_RG: Sequence[Sequence[float]], deepspeed: Any) -> float:
        """The norm, after the optimizer step.

        Args:
            scalar_RG: what `scalars` returned on each rank.
        """
        if self._stage == 0:
            return scalar_RG[0][0]
        if not self._partitioned:
            norm = deepspeed.get_global_grad_norm()
            return 0.0 if norm is None else float(norm)
        of_groups: float = torch.linalg.vector_norm(torch.tensor(scalar_RG).sum(0).sqrt()).tolist()
        return of_groups


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


def check_finite(
    step_R: Sequence[StepStatus], parts: Mapping[str, float], terms: Iterable[object], sizes: Sequence[int]
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
        shown = ", ".join(f"{name}={part:g}" for name, part in parts.items())
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


def _ranks_not_finite(step_R: Sequence[StepStatus], terms: Iterable[object], sizes: Sequence[int]) -> list[int]:
    """Ranks at fault for a loss of the global batch: those whose rows of the terms are not finite, or, as all ranks
    compute the loss from the same terms, those that got another loss from them."""
    parts = [torch.split(term.detach(), list(sizes)) for term in terms if isinstance(term, Tensor)]
    finite_R = [all(bool(part[rank].isfinite().all()) for part in parts) for rank in range(len(sizes))]
    return ranks_that_differ(finite_R) or ranks_that_differ([math.isfinite(step.loss) for step in step_R])
