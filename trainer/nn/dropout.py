"""Dropout whose masks do not depend on how many ranks share a batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer.data.batches import Rows


class RowDropout(nn.Module):
    """Draws the masks of the whole global batch and keeps those of its own rows.

    The engine seeds every rank alike before each step, so each user meets the same mask at any number of ranks.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor, rows: Rows) -> Tensor:
        """`x` (rows.count, ...) with elements dropped and the rest scaled by 1 / (1 - p) in training."""
        if not self.training or self.p == 0.0:
            return x
        draw = torch.rand((rows.total, *x.shape[1:]), device=x.device)[rows.start : rows.start + rows.count]
        return x * (draw >= self.p) / (1.0 - self.p)
