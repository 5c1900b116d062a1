"""SASRec (Kang & McAuley, ICDM 2018) in the variant that LLM-SRec distils.

Letters: B users, L positions, D width, K negatives, C = 1 + K candidates, M real positions of the batch, N items,
S slots (positions of all buckets end to end), X some of the slots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from trainer.config import SASRecConfig
from trainer.data.collators.base import ItemIds, ItemSequences
from trainer.data.collators.sequences import SequenceTraining
from trainer.models.by_id.buckets import Buckets, bucketed
from trainer.models.by_id.sequence_terms import SequenceTerms, by_user, mean_over_positions
from trainer.models.interface import Losses
from trainer.nn import losses
from trainer.nn.causal_attention import CausalAttention
from trainer.nn.dropout import HashDropout, position_words

_FEW = 5
"""Candidates up to which a product and a sum take a third of the time of a batched matrix product; with more it is
the other way round."""


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
        self.dropout = HashDropout(config.dropout, (config.dim,), address=0)
        self.blocks = nn.ModuleList(_Block(config, index) for index in range(config.blocks))
        self.norm = nn.LayerNorm(config.dim, eps=1e-8)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_normal_(parameter)
        with torch.no_grad():
            self.items.weight[0] = 0.0  # padding

    def forward(self, batch: SequenceTraining) -> SequenceTerms:
        """Loss of every real position."""
        slots = self._slots(batch.input)
        hidden_SD = self._states(batch.input, self.blocks, slots)
        at_M = batch.position_M
        hidden_MD = self.norm(hidden_SD.index_select(0, slots.buckets.slot_BL.flatten()[at_M]))
        target_M, negative_MK = batch.target_BL.flatten()[at_M], batch.negative_BLK.flatten(0, 1)[at_M]
        return by_user(self._position_loss(hidden_MD, target_M, negative_MK), at_M, batch.target_BL)

    def loss(self, terms: SequenceTerms) -> Losses:
        """Mean over all real positions of the global batch."""
        return mean_over_positions(terms, self.config.loss)

    @property
    def dim(self) -> int:
        """Width of user and item vectors."""
        return self.config.dim

    def user_vectors(self, batch: ItemSequences) -> Tensor:
        """(B, D) hidden states at the last position, the only one that the last block computes."""
        *before, final = self.blocks
        assert isinstance(final, _Block)
        slots = self._slots(batch)
        last_hidden_BD = final.last(self._states(batch, before, slots), slots)
        hidden_BD = torch.empty_like(last_hidden_BD).index_copy(0, slots.buckets.row_B, last_hidden_BD)
        # Padding is zero before the last norm, also that of a user without items.
        vector_BD: Tensor = self.norm(hidden_BD * (batch.item_BL[:, -1:] > 0))
        return vector_BD

    def item_vectors(self, batch: ItemIds) -> Tensor:
        """(M, D) rows of the item table."""
        rows: Tensor = self.items(batch.item_M)
        return rows

    def _slots(self, batch: ItemSequences) -> _Slots:
        real_BL = batch.item_BL > 0
        # Padding that attention sees is computed like items.
        length_B = (real_BL if self.config.mask_padding else torch.ones_like(real_BL)).sum(1)
        buckets = bucketed(length_B, real_BL.shape[1])
        item_S = batch.item_BL[buckets.row_S, buckets.column_S]
        return _Slots(
            buckets,
            item_S,
            position_words(buckets.row_S + batch.rows.start, buckets.place_S) if self.dropout.active else None,
            None if self.config.mask_padding else (item_S > 0)[:, None].to(self.norm.weight.dtype),
        )

    def _states(self, batch: ItemSequences, blocks: Iterable[nn.Module], slots: _Slots) -> Tensor:
        """(S, D) states after these blocks, the first ones."""
        # Positions count from the right edge of `max_length`, so that trimming common padding changes nothing.
        position_S = slots.buckets.column_S + (self.config.max_length - batch.item_BL.shape[1])
        hidden_SD = torch.add(self.positions(position_S), self.items(slots.item_S), alpha=self.config.dim**0.5)
        hidden_SD = slots.zeroed(self.dropout(hidden_SD, slots.word_S))
        for block in blocks:
            hidden_SD = slots.zeroed(block(hidden_SD, slots))
        return hidden_SD

    def _position_loss(self, hidden_MD: Tensor, target_M: Tensor, negative_MK: Tensor) -> Tensor:
        if self.config.loss == "full_softmax":
            table_ND = self.items(torch.arange(1, self.num_items + 1, device=target_M.device))
            return losses.catalog_softmax(hidden_MD, table_ND, target_M)
        score_MC = _scores(hidden_MD, self.items(torch.cat((target_M[:, None], negative_MK), 1)))
        positive_M, negative_score_MK = score_MC[:, 0], score_MC[:, 1:]
        if self.config.loss == "bce":
            return losses.binary_cross_entropy(positive_M, negative_score_MK)
        if self.config.loss == "gbce":
            return losses.gbce(positive_M, negative_score_MK, num_items=self.num_items, t=self.config.gbce_t)
        return losses.sampled_softmax(positive_M, negative_score_MK)


def _scores(hidden_MD: Tensor, candidate_MCD: Tensor) -> Tensor:
    """(M, C) inner products of each row with its candidates."""
    if candidate_MCD.shape[1] <= _FEW:
        return (hidden_MD[:, None] * candidate_MCD).sum(-1)
    return torch.einsum("md,mcd->mc", hidden_MD, candidate_MCD)


@dataclass(frozen=True)
class _Slots:
    """A batch as the blocks read it, besides its states."""

    buckets: Buckets
    item_S: Tensor
    word_S: Tensor | None
    """See `HashDropout`; None where nothing is dropped."""
    real_S1: Tensor | None
    """0 at padding, 1 at items; None if attention does not see padding."""

    def zeroed(self, x_SD: Tensor) -> Tensor:
        """`x`, zero at padding that attention sees."""
        return x_SD if self.real_S1 is None else x_SD * self.real_S1


class _Block(nn.Module):
    """Attention and feed-forward, with layer norms where `config.norm` puts them."""

    def __init__(self, config: SASRecConfig, index: int) -> None:
        super().__init__()
        self.order = config.norm
        self.attention_norm = nn.LayerNorm(config.dim, eps=1e-8)
        first = 1 + 3 * index  # address of the first of three dropouts; 0 is that of the input
        self.attention = CausalAttention(config.dim, config.heads, config.max_length, config.dropout, first)
        self.feed_norm = nn.LayerNorm(config.dim, eps=1e-8)
        self.expand = nn.Linear(config.dim, config.dim)  # a 1x1 convolution in the paper's code
        self.contract = nn.Linear(config.dim, config.dim)
        self.expand_dropout = HashDropout(config.dropout, (config.dim,), first + 1)
        self.contract_dropout = HashDropout(config.dropout, (config.dim,), first + 2)

    def forward(self, x_SD: Tensor, slots: _Slots) -> Tensor:
        """(S, D) states after this block."""
        attend = partial(self.attention, word_S=slots.word_S, shapes=slots.buckets.shapes)
        return self._layers(x_SD, slots.word_S, lambda x_SD: x_SD, attend)

    def last(self, x_SD: Tensor, slots: _Slots) -> Tensor:
        """(B, D) states after this block at the last position of each row, in the order of the buckets."""
        slot_B, last_B = slots.buckets.last_slot_B, slots.buckets.last_B
        word_B = None if slots.word_S is None else slots.word_S[slot_B]
        attend = partial(self.attention.last, word_X=word_B, shapes=slots.buckets.shapes, last_X=last_B)
        return self._layers(x_SD, word_B, lambda x_SD: x_SD[slot_B], attend)

    def _layers(
        self, x_SD: Tensor, word_X: Tensor | None, pick: Callable[[Tensor], Tensor], attend: Callable[..., Tensor]
    ) -> Tensor:
        """(X, D) states of those X slots that `pick` selects.

        Args:
            attend: attention of the selected slots, computed from (queries of these, memory of all).
        """
        if self.order == "post":
            query_XD = pick(x_SD)
            query_XD = self.attention_norm(query_XD + attend(query_XD, x_SD))
            fed_XD: Tensor = self.feed_norm(self._fed(query_XD, query_XD, word_X))
            return fed_XD
        if self.order == "pre":
            memory_SD = self.attention_norm(x_SD)
            state_XD = pick(x_SD) + attend(pick(memory_SD), memory_SD)
            return self._fed(self.feed_norm(state_XD), state_XD, word_X)
        # "original": only queries are normalised, and the residual is the normalised query (Kang's code).
        query_XD = self.attention_norm(pick(x_SD))
        state_XD = self.feed_norm(query_XD + attend(query_XD, x_SD))
        return self._fed(state_XD, state_XD, word_X)

    def _fed(self, x_XD: Tensor, residual_XD: Tensor, word_X: Tensor | None) -> Tensor:
        """The residual plus what the feed-forward layers make of `x`."""
        hidden_XD = self.expand_dropout.relu(self.expand(x_XD), word_X)
        return self.contract_dropout.added(self.contract(hidden_XD), residual_XD, word_X)
