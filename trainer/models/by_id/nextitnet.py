"""NextItNet (Yuan et al., WSDM 2019).

Letters: B users, L positions, D width, M real positions of the batch.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from trainer.config import NextItNetConfig
from trainer.data.collators.base import ItemIds, ItemSequences
from trainer.data.collators.sequences import SequenceTraining
from trainer.models.by_id.sequence_terms import SequenceTerms, by_user, mean_over_positions
from trainer.models.interface import Losses
from trainer.nn import losses
from trainer.nn.dropout import RowDropout
from trainer.nn.item_table import ItemTable, initialize


class NextItNet(nn.Module):
    """Dilated causal convolutions over item vectors; the state at the last item is the user vector."""

    def __init__(self, config: NextItNetConfig, num_items: int) -> None:
        super().__init__()
        self.config = config
        self.items = ItemTable(num_items, config.dim)
        self.dropout = RowDropout(config.dropout)
        block = _TwoLayerBlock if config.block == "two_layer" else _OneLayerBlock
        self.blocks = nn.ModuleList(block(config.dim, config.kernel, dilation) for dilation in config.dilations)
        self.to_items = nn.Linear(config.dim, config.dim)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv1d):
                initialize(module.weight)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(self, batch: SequenceTraining) -> SequenceTerms:
        """Cross-entropy over the catalog at every real position; the official code counts padding too."""
        at_M = batch.position_M
        query_MD = self.items.query(self.to_items(self._encode(batch.input).flatten(0, 1)[at_M]))
        loss_M = losses.catalog_softmax(query_MD, self.items.catalog(), batch.target_BL.flatten()[at_M])
        return by_user(loss_M, at_M, batch.target_BL)

    def loss(self, terms: SequenceTerms) -> Losses:
        """Mean over all real positions of the global batch."""
        return mean_over_positions(terms, "full_softmax")

    def user_vectors(self, batch: ItemSequences) -> Tensor:
        """(B, D + 1) states at the last item, with a 1 appended for the bias."""
        return self.items.query(self.to_items(self._encode(batch)[:, -1]))

    def item_vectors(self, batch: ItemIds) -> Tensor:
        """(M, D + 1) rows of the item table with their bias."""
        return self.items.output(batch.item_M)

    def _encode(self, batch: ItemSequences) -> Tensor:
        real_BL1 = (batch.item_BL > 0)[:, :, None]
        hidden_BLD: Tensor = self.dropout(self.items(batch.item_BL), batch.rows)
        for block in self.blocks:
            hidden_BLD = hidden_BLD + self.dropout(block(hidden_BLD, real_BL1), batch.rows)
        return hidden_BLD


class _CausalConvolution(nn.Module):
    """Position i reads i, i - dilation, ..., `kernel` positions in all; padding reads as zero at any depth."""

    def __init__(self, dim: int, kernel: int, dilation: int) -> None:
        super().__init__()
        self.reach = (kernel - 1) * dilation
        self.convolution = nn.Conv1d(dim, dim, kernel, dilation=dilation)

    def forward(self, x_BLD: Tensor, real_BL1: Tensor) -> Tensor:
        x_BDL = F.pad((x_BLD * real_BL1).transpose(1, 2), (self.reach, 0))
        convolved: Tensor = self.convolution(x_BDL).transpose(1, 2)
        return convolved


class _TwoLayerBlock(nn.Module):
    """Residual branch of Figure 3b: two dilated convolutions, the second with twice the dilation."""

    def __init__(self, dim: int, kernel: int, dilation: int) -> None:
        super().__init__()
        self.first = _CausalConvolution(dim, kernel, dilation)
        self.first_norm = nn.LayerNorm(dim)
        self.second = _CausalConvolution(dim, kernel, 2 * dilation)
        self.second_norm = nn.LayerNorm(dim)

    def forward(self, x_BLD: Tensor, real_BL1: Tensor) -> Tensor:
        x_BLD = F.relu(self.first_norm(self.first(x_BLD, real_BL1)))
        return F.relu(self.second_norm(self.second(x_BLD, real_BL1)))


class _OneLayerBlock(nn.Module):
    """Residual branch of Figure 3a: one dilated convolution at half the width, with a norm before each layer."""

    def __init__(self, dim: int, kernel: int, dilation: int) -> None:
        super().__init__()
        self.narrow_norm = nn.LayerNorm(dim)
        self.narrow = nn.Linear(dim, dim // 2)  # a 1x1 convolution
        self.norm = nn.LayerNorm(dim // 2)
        self.convolution = _CausalConvolution(dim // 2, kernel, dilation)
        self.widen_norm = nn.LayerNorm(dim // 2)
        self.widen = nn.Linear(dim // 2, dim)

    def forward(self, x_BLD: Tensor, real_BL1: Tensor) -> Tensor:
        x_BLD = self.narrow(F.relu(self.narrow_norm(x_BLD)))
        x_BLD = self.convolution(F.relu(self.norm(x_BLD)), real_BL1)
        widened: Tensor = self.widen(F.relu(self.widen_norm(x_BLD)))
        return widened
