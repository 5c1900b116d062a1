"""Item vectors that are read at the input and scored at the output, with one bias an item.

Letters: M items, N items of the catalog, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

INIT_STD = 0.02
"""Of the normal distribution, cut at two standard deviations, of BERT4Rec's and NextItNet's official code."""


class ItemTable(nn.Module):
    """Rows of the items 1 to N, of padding (0) and of `extra` ids after the last item.

    The score of state h for item i is h·v_i + b_i, which is the inner product of (h, 1) and (v_i, b_i): see `query`
    and `output`.
    """

    def __init__(self, num_items: int, dim: int, extra: int = 0) -> None:
        super().__init__()
        self.num_items = num_items
        self.vectors = nn.Embedding(num_items + 1 + extra, dim, padding_idx=0)
        # A table too, so that ZeRO-3 gathers it where it is used.
        self.bias = nn.Embedding(num_items + 1, 1, padding_idx=0)
        initialize(self.vectors.weight)
        nn.init.zeros_(self.bias.weight)
        with torch.no_grad():
            self.vectors.weight[0] = 0.0

    def forward(self, item: Tensor) -> Tensor:
        """Vectors (..., D) of ids (...) at the input; padding is zero and gets no gradient."""
        vectors: Tensor = self.vectors(item)
        return vectors

    def output(self, item: Tensor) -> Tensor:
        """What items (...) are scored with: (..., D + 1)."""
        return torch.cat((self.vectors(item), self.bias(item)), dim=-1)

    def catalog(self) -> Tensor:
        """`output` of all items: (N, D + 1)."""
        return self.output(torch.arange(1, self.num_items + 1, device=self.vectors.weight.device))

    @staticmethod
    def query(state: Tensor) -> Tensor:
        """States (..., D) as they meet `output`: (..., D + 1)."""
        return torch.cat((state, torch.ones_like(state[..., :1])), dim=-1)


def initialize(weight: Tensor) -> None:
    """Fill in place from the truncated normal distribution of `INIT_STD`."""
    nn.init.trunc_normal_(weight, std=INIT_STD, a=-2 * INIT_STD, b=2 * INIT_STD)
