"""Item embeddings tied between input and output, with one output bias per item.

Letters: M items, N items of the catalog, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

INIT_STD = 0.02
"""Standard deviation of the initial normal distribution, truncated at two deviations (official code of BERT4Rec and
NextItNet)."""


class ItemTable(nn.Module):
    """Embeddings of the items 1 to N, of padding (0) and of `extra` ids after the last item.

    The score of state h for item i is h·v_i + b_i, the inner product of (h, 1) and (v_i, b_i): see `query` and
    `output`.
    """

    def __init__(self, num_items: int, dim: int, extra: int = 0) -> None:
        super().__init__()
        self.num_items = num_items
        self.vectors = nn.Embedding(num_items + 1 + extra, dim, padding_idx=0)
        # An embedding too, because ZeRO-3 gathers parameters when the module that owns them is called.
        self.bias = nn.Embedding(num_items + 1, 1, padding_idx=0)
        initialize(self.vectors.weight)
        nn.init.zeros_(self.bias.weight)
        with torch.no_grad():
            self.vectors.weight[0] = 0.0  # padding, which `initialize` has overwritten

    def forward(self, item: Tensor) -> Tensor:
        """(..., D) input vectors of ids (...); padding is zero and gets no gradient."""
        vectors: Tensor = self.vectors(item)
        return vectors

    def output(self, item: Tensor) -> Tensor:
        """(..., D + 1) output vectors of items (...), the bias appended."""
        return torch.cat((self.vectors(item), self.bias(item)), dim=-1)

    def catalog(self) -> Tensor:
        """(N, D + 1) output vectors of all items."""
        return self.output(torch.arange(1, self.num_items + 1, device=self.vectors.weight.device))

    @staticmethod
    def query(state: Tensor) -> Tensor:
        """(..., D + 1) states (..., D) with a 1 appended, to be multiplied with `output`."""
        return torch.cat((state, torch.ones_like(state[..., :1])), dim=-1)


def initialize(weight: Tensor) -> None:
    """Fill in place from the truncated normal distribution of standard deviation `INIT_STD`."""
    nn.init.trunc_normal_(weight, std=INIT_STD, a=-2 * INIT_STD, b=2 * INIT_STD)
