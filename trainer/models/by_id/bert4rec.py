"""BERT4Rec (Sun et al., CIKM 2019).

Letters: B users, L positions, D width, M masked positions of the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.config import BERT4RecConfig
from trainer.data.collators.base import BatchRows, ItemIds, ItemSequences
from trainer.data.collators.masking import MaskedTraining
from trainer.models.by_id.sequence_terms import SequenceTerms, by_user, mean_over_users
from trainer.models.interface import Losses
from trainer.nn import losses
from trainer.nn.dropout import RowDropout
from trainer.nn.item_table import ItemTable, initialize
from trainer.nn.self_attention import Attention


class BERT4Rec(nn.Module):
    """Bidirectional self-attention; the user vector is the prediction at a mask after the last item."""

    def __init__(self, config: BERT4RecConfig, num_items: int) -> None:
        super().__init__()
        self.config = config
        self.items = ItemTable(num_items, config.dim, extra=1)  # the mask token
        self.positions = nn.Embedding(config.max_length, config.dim)
        self.norm = nn.LayerNorm(config.dim)
        self.dropout = RowDropout(config.dropout)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.blocks))
        self.head = nn.Sequential(nn.Linear(config.dim, config.dim), nn.GELU(), nn.LayerNorm(config.dim))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                initialize(module.weight)
                nn.init.zeros_(module.bias)
        initialize(self.positions.weight)

    def forward(self, batch: MaskedTraining) -> SequenceTerms:
        """Cross-entropy of every masked item over the catalog."""
        at_M = batch.position_M
        query_MD = self.items.query(self.head(self._encode(batch.input).flatten(0, 1)[at_M]))
        loss_M = losses.catalog_softmax(query_MD, self.items.catalog(), batch.target_BL.flatten()[at_M])
        return by_user(loss_M, at_M, batch.target_BL)

    def loss(self, terms: SequenceTerms) -> Losses:
        """Equation 8: mean over each sequence's masks, then over sequences, however many masks they have."""
        return mean_over_users(terms, "masked_item")

    def user_vectors(self, batch: ItemSequences) -> Tensor:
        """(B, D + 1) predictions at the last position, which holds the mask, with a 1 appended for the bias."""
        return self.items.query(self.head(self._encode(batch)[:, -1]))

    def item_vectors(self, batch: ItemIds) -> Tensor:
        """(M, D + 1) rows of the item table with their bias."""
        return self.items.output(batch.item_M)

    def _encode(self, batch: ItemSequences) -> Tensor:
        item_BL, rows = batch.item_BL, batch.rows
        length = item_BL.shape[1]
        # Positions count from the right edge of `max_length`, so that trimming common padding changes nothing.
        position_L = torch.arange(self.config.max_length - length, self.config.max_length, device=item_BL.device)
        hidden_BLD: Tensor = self.dropout(self.norm(self.items(item_BL) + self.positions(position_L)), rows)
        # Padding may attend to itself: a row of attention without any key would be NaN.
        itself_LL = torch.eye(length, dtype=torch.bool, device=item_BL.device)
        visible_B1LL = ((item_BL > 0)[:, None, :] | itself_LL)[:, None]
        for block in self.blocks:
            hidden_BLD = block(hidden_BLD, visible_B1LL, rows)
        return hidden_BLD


class _Block(nn.Module):
    """Equations 1 to 6: attention and feed-forward, each followed by dropout, residual and norm."""

    def __init__(self, config: BERT4RecConfig) -> None:
        super().__init__()
        self.attention = Attention(config.dim, config.heads, config.dropout)
        self.attention_norm = nn.LayerNorm(config.dim)
        self.expand = nn.Linear(config.dim, 4 * config.dim)
        self.contract = nn.Linear(4 * config.dim, config.dim)
        self.feed_norm = nn.LayerNorm(config.dim)
        self.dropout = RowDropout(config.dropout)

    def forward(self, x_BLD: Tensor, visible_B1LL: Tensor, rows: BatchRows) -> Tensor:
        attended_BLD = self.attention(x_BLD, x_BLD, visible_B1LL, rows)
        x_BLD = self.attention_norm(x_BLD + self.dropout(attended_BLD, rows))
        fed_BLD = self.contract(F.gelu(self.expand(x_BLD)))
        out_BLD: Tensor = self.feed_norm(x_BLD + self.dropout(fed_BLD, rows))
        return out_BLD
