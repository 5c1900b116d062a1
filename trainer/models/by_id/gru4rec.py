"""GRU4Rec (Hidasi et al., ICLR 2016) with BPR-max (Hidasi & Karatzoglou, CIKM 2018), over whole user sequences.

The official code trains session-parallel mini-batches without back-propagation through time. Here each user has one
long sequence, so all its positions are trained at once, with back-propagation through time, as in RecBole.

Letters: B users, L positions, D width of items, S width of the state, K negatives, M real positions of the batch.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from trainer.config import GRU4RecConfig
from trainer.data.collators.base import ItemIds, ItemSequences
from trainer.data.collators.shared_negatives import SharedNegativeTraining
from trainer.models.by_id.sequence_terms import SequenceTerms, by_user, mean_over_positions
from trainer.models.interface import Losses
from trainer.nn import losses
from trainer.nn.dropout import RowDropout
from trainer.nn.item_table import ItemTable


class GRU4Rec(nn.Module):
    """Gated recurrent units over item vectors; the state after the last item is the user vector."""

    def __init__(self, config: GRU4RecConfig, num_items: int) -> None:
        super().__init__()
        self.config = config
        self.items = ItemTable(num_items, config.dim)
        widths = [config.dim] + [config.hidden] * config.layers
        # One module per layer, so that the dropout between layers can be `RowDropout`.
        self.layers = nn.ModuleList(nn.GRU(below, above, batch_first=True) for below, above in pairwise(widths))
        self.to_items = nn.Identity() if config.hidden == config.dim else nn.Linear(config.hidden, config.dim)
        self.dropout = RowDropout(config.dropout)
        self.hidden_dropout = RowDropout(config.hidden_dropout)
        for name, parameter in [*self.layers.named_parameters(), *self.to_items.named_parameters()]:
            if parameter.dim() == 1:
                nn.init.zeros_(parameter)
                continue
            # A GRU stacks the weights of its three gates; each gets its own Xavier bound.
            for gate in parameter.chunk(3) if "weight_" in name else [parameter]:
                nn.init.xavier_uniform_(gate)

    def forward(self, batch: SharedNegativeTraining) -> SequenceTerms:
        """Loss of every real position."""
        query_BLD = self._queries(batch.input)
        at_M = batch.position_M
        target_M, query_MD = batch.target_BL.flatten()[at_M], query_BLD.flatten(0, 1)[at_M]
        if self.config.loss == "full_softmax":
            loss_M = losses.catalog_softmax(query_MD, self.items.catalog(), target_M)
            return by_user(loss_M, at_M, batch.target_BL)
        positive_M = (query_MD * self.items.output(target_M)).sum(-1)
        negative_MK = (query_BLD @ self.items.output(batch.negative_BK).transpose(1, 2)).flatten(0, 1)[at_M]
        if self.config.loss == "sampled_softmax":
            return by_user(losses.sampled_softmax(positive_M, negative_MK), at_M, batch.target_BL)
        loss_M = losses.bpr_max(
            positive_M, negative_MK, regularization=self.config.bpr_regularization, elu=self.config.bpr_elu
        )
        return by_user(loss_M, at_M, batch.target_BL)

    def loss(self, terms: SequenceTerms) -> Losses:
        """Mean over all real positions of the global batch."""
        return mean_over_positions(terms, self.config.loss)

    def user_vectors(self, batch: ItemSequences) -> Tensor:
        """(B, D + 1) states after the last item, with a 1 appended for the bias."""
        return self._queries(batch)[:, -1]

    def item_vectors(self, batch: ItemIds) -> Tensor:
        """(M, D + 1) rows of the item table with their bias."""
        return self.items.output(batch.item_M)

    def _queries(self, batch: ItemSequences) -> Tensor:
        state_BLS = self.dropout(self.items(batch.item_BL), batch.rows)
        # The recurrence must start at each user's first item, so padding moves to the end meanwhile.
        padding_B1 = (batch.item_BL == 0).sum(1, keepdim=True)
        state_BLS = _rotated(state_BLS, padding_B1)
        for layer in self.layers:
            state_BLS = self.hidden_dropout(layer(state_BLS)[0], batch.rows)
        return self.items.query(self.to_items(_rotated(state_BLS, -padding_B1)))


def _rotated(x_BLD: Tensor, shift_B1: Tensor) -> Tensor:
    """Each row rotated to the left by its shift."""
    length = x_BLD.shape[1]
    index_BL = (torch.arange(length, device=x_BLD.device) + shift_B1) % length
    return x_BLD.gather(1, index_BL[:, :, None].expand_as(x_BLD))
