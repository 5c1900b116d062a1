"""Norms of the gradient: this rank's own, to check that it is finite, and the averaged one, to report.

Letters: R ranks, G parameter groups.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trainer.config.deepspeed_json import zero_stage

_NEED_THE_NORM = {"offload_optimizer", "zenflow"}
"""Keys of `zero_optimization` with which DeepSpeed always computes the norm itself."""


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
            norms = [torch.linalg.vector_norm(g.float()) for g in gradients if not getattr(g, "_zero_padding", False)]
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
        return float(torch.linalg.vector_norm(torch.tensor(scalar_RG).sum(0).sqrt()))
