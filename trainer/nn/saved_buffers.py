"""Tables that are computed rather than trained, and too expensive or impossible to recompute on resume."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer.nn.module import Module


class SavedTable(nn.Module):
    """A buffer of vectors (rows, dim) without gradient, saved in checkpoints beside the trained weights."""

    def __init__(self, rows: int, dim: int) -> None:
        super().__init__()
        self.value: Tensor
        self.register_buffer("value", torch.zeros(rows, dim))

    def forward(self, index: Tensor) -> Tensor:
        """(..., dim) rows at `index` (...)."""
        return self.value[index]

    @torch.no_grad()
    def replace(self, rows: Tensor) -> None:
        """Replace all rows; `rows` is (rows, dim)."""
        self.value.copy_(rows)


def saved_buffers(model: Module) -> dict[str, Tensor]:
    """Saved tables of a model, by their names in a checkpoint."""
    return {f"{name}.value": module.value for name, module in model.named_modules() if isinstance(module, SavedTable)}
