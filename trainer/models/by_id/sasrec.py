"""SASRec (Kang & McAuley, ICDM 2018) in the variant that LLM-SRec distils.

Letters: B users, L positions, D width, K negatives, M real positions of the batch, N items.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.config import SASRecConfig
from trainer.data.collators.base import BatchRows, ItemIds, ItemSequences
from trainer.data.collators.sequences import SequenceTraining
from trainer.models.by_id.sequence_terms import SequenceTerms, by_user, mean_over_positions
from trainer.models.interface import Losses
from trainer.nn import losses
from trainer.nn.dropout import RowDropout
from trainer.nn.self_attention import Attention


class SASRec(nn.Module):
    """Causal self-attention over item ids.

    The user vector is the state at the last position; item vectors are rows of the item table.
    """

    def __init__(self, config: SASRecConfig, num_items: int) -> None:
        super().__init__()
        self.config = config
        self.num_items = num_items
        self.items = nn.Embedding(num_items + 1, config.dim)
        self.positions = nn.Embedding(config.max_length, config.dim)
        self.dropout = RowDropout(config.dropout)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.blocks))
        self.norm = nn.LayerNorm(config.dim, eps=1e-8)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_normal_(parameter)
        with torch.no_grad():
            self.items.weight[0] = 0.0  # padding

    def forward(self, batch: SequenceTraining) -> SequenceTerms:
        """Loss of every real position."""
        hidden_BLD = self._encode(batch.input)
        real_BL = batch.target_BL > 0
        loss_M = self._position_loss(hidden_BLD[real_BL], batch.target_BL[real_BL], batch.negative_BLK[real_BL])
        return by_user(loss_M, real_BL)

    def loss(self, terms: SequenceTerms) -> Losses:
        """Mean over all real positions of the global batch."""
        return mean_over_positions(terms, self.config.loss)

    def user_vectors(self, batch: ItemSequences) -> Tensor:
        """(B, D) hidden states at the last position."""
        return self._encode(batch)[:, -1]

    def item_vectors(self, batch: ItemIds) -> Tensor:
        """(M, D) rows of the item table."""
        rows: Tensor = self.items(batch.item_M)
        return rows

    def _encode(self, batch: ItemSequences) -> Tensor:
        item_BL, rows = batch.item_BL, batch.rows
        length = item_BL.shape[1]
        real_BL1 = (item_BL > 0)[:, :, None]
        # Positions count from the right edge of `max_length`, so that trimming common padding changes nothing.
        position_L = torch.arange(self.config.max_length - length, self.config.max_length, device=item_BL.device)
        hidden_BLD = self.items(item_BL) * self.config.dim**0.5 + self.positions(position_L)
        hidden_BLD = self.dropout(hidden_BLD, rows) * real_BL1
        visible_B1LL = self._visible(item_BL)
        for block in self.blocks:
            hidden_BLD = block(hidden_BLD, visible_B1LL, rows) * real_BL1
        encoded: Tensor = self.norm(hidden_BLD)
        return encoded

    def _visible(self, item_BL: Tensor) -> Tensor:
        """(B, 1, L, L) mask: position i may attend to j."""
        length = item_BL.shape[1]
        causal_LL = torch.ones(length, length, dtype=torch.bool, device=item_BL.device).tril()
        if not self.config.mask_padding:
            return causal_LL[None, None].expand(len(item_BL), 1, length, length)
        # Padding may attend to itself: a row of attention without any key would be NaN.
        itself_LL = torch.eye(length, dtype=torch.bool, device=item_BL.device)
        return (causal_LL & ((item_BL > 0)[:, None, :] | itself_LL))[:, None]

    def _position_loss(self, hidden_MD: Tensor, target_M: Tensor, negative_MK: Tensor) -> Tensor:
        if self.config.loss == "full_softmax":
            table_ND = self.items(torch.arange(1, self.num_items + 1, device=target_M.device))
            return losses.catalog_softmax(hidden_MD, table_ND, target_M)
        positive_M = (hidden_MD * self.items(target_M)).sum(-1)
        negative_score_MK = torch.einsum("md,mkd->mk", hidden_MD, self.items(negative_MK))
        if self.config.loss == "bce":
            return losses.binary_cross_entropy(positive_M, negative_score_MK)
        if self.config.loss == "gbce":
            return losses.gbce(positive_M, negative_score_MK, num_items=self.num_items, t=self.config.gbce_t)
        return losses.sampled_softmax(positive_M, negative_score_MK)


class _Block(nn.Module):
    """Attention and feed-forward, with layer norms where `config.norm` puts them."""

    def __init__(self, config: SASRecConfig) -> None:
        super().__init__()
        self.order = config.norm
        self.attention_norm = nn.LayerNorm(config.dim, eps=1e-8)
        self.attention = Attention(config.dim, config.heads, config.dropout)
        self.feed_norm = nn.LayerNorm(config.dim, eps=1e-8)
        self.expand = nn.Linear(config.dim, config.dim)  # a 1x1 convolution in the paper's code
        self.contract = nn.Linear(config.dim, config.dim)
        self.dropout = RowDropout(config.dropout)

    def forward(self, x_BLD: Tensor, visible_B1LL: Tensor, rows: BatchRows) -> Tensor:
        if self.order == "post":
            x_BLD = self.attention_norm(x_BLD + self.attention(x_BLD, x_BLD, visible_B1LL, rows))
            fed_BLD: Tensor = self.feed_norm(x_BLD + self._feed(x_BLD, rows))
            return fed_BLD
        query_BLD = self.attention_norm(x_BLD)
        if self.order == "pre":
            x_BLD = x_BLD + self.attention(query_BLD, query_BLD, visible_B1LL, rows)
            return x_BLD + self._feed(self.feed_norm(x_BLD), rows)
        # "original": only queries are normalised, and the residual is the normalised query (Kang's code).
        x_BLD = self.feed_norm(query_BLD + self.attention(query_BLD, x_BLD, visible_B1LL, rows))
        return x_BLD + self._feed(x_BLD, rows)

    def _feed(self, x_BLD: Tensor, rows: BatchRows) -> Tensor:
        hidden_BLD = F.relu(self.dropout(self.expand(x_BLD), rows))
        fed_BLD: Tensor = self.dropout(self.contract(hidden_BLD), rows)
        return fed_BLD
