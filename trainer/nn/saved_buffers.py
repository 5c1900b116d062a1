"""What is computed rather than trained, and too dear or impossible to compute again when a run goes on."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class CarriedTable(nn.Module):
    """Rows of vectors without gradient that checkpoints carry beside the weights."""

    def __init__(self, rows: int, dim: int) -> None:
        super().__init__()
        self.value: Tensor
        self.register_buffer("value", torch.zeros(rows, dim))

    def forward(self, index: Tensor) -> Tensor:
        """The rows at `index`, (..., dim)."""
        return self.value[index]

    @torch.no_grad()
    def keep(self, rows: Tensor) -> None:
        """Replace all rows."""
        self.value.copy_(rows)


def carried(model: nn.Module) -> dict[str, Tensor]:
    """The tables of a model, by the name that a checkpoint gives them."""
    return {f"{name}.value": module.value for name, module in model.named_modules() if isinstance(module, CarriedTable)}
