"""Attention written out, because the dropout of its weights must not depend on the number of ranks.

Letters: B users, L positions, D width, H heads, d width of a head.
"""

from __future__ import annotations

from torch import Tensor, nn

from trainer.data.collators.base import BatchRows
from trainer.nn.dropout import RowDropout


class Attention(nn.Module):
    """Multi-head attention with dropout on the attention weights."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)
        self.dropout = RowDropout(dropout)
        for layer in (self.query, self.key, self.value, self.out):
            nn.init.zeros_(layer.bias)

    def forward(self, query_BLD: Tensor, memory_BLD: Tensor, visible_B1LL: Tensor, rows: BatchRows) -> Tensor:
        """(B, L, D) attention of `query_BLD` over `memory_BLD`.

        Args:
            visible_B1LL: `[b, 0, i, j]` is True where position i may attend to j; a row without any would be NaN.
            rows: rows of the global batch, for dropout.
        """

        def split(x_BLD: Tensor) -> Tensor:
            return x_BLD.view(*x_BLD.shape[:2], self.heads, x_BLD.shape[-1] // self.heads).transpose(1, 2)

        q_BHLd, k_BHLd, v_BHLd = (
            split(self.query(query_BLD)),
            split(self.key(memory_BLD)),
            split(self.value(memory_BLD)),
        )
        score_BHLL = q_BHLd @ k_BHLd.transpose(-1, -2) / q_BHLd.shape[-1] ** 0.5
        weight_BHLL = score_BHLL.masked_fill(~visible_B1LL, float("-inf")).softmax(-1)
        mixed_BHLd = self.dropout(weight_BHLL, rows) @ v_BHLd
        attended_BLD: Tensor = self.out(mixed_BHLd.transpose(1, 2).flatten(-2))
        return attended_BLD
