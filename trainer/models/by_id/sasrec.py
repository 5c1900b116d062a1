"""SASRec (Kang & McAuley, ICDM 2018) in the variant that LLM-SRec distils.

Letters: B users (of a batch, or of a bucket of it), L positions, Q positions computed, D width, K negatives, M real
positions of the batch, N items, S slots (positions of all buckets end to end).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
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
        hidden_SD, buckets = self._encode(batch.input)
        real_BL = batch.target_BL > 0
        hidden_MD = self.norm(hidden_SD.index_select(0, buckets.slot_BL[real_BL]))
        loss_M = self._position_loss(hidden_MD, batch.target_BL[real_BL], batch.negative_BLK[real_BL])
        return by_user(loss_M, real_BL)

    def loss(self, terms: SequenceTerms) -> Losses:
        """Mean over all real positions of the global batch."""
        return mean_over_positions(terms, self.config.loss)

    def user_vectors(self, batch: ItemSequences) -> Tensor:
        """(B, D) hidden states at the last position, the only one that the last block computes."""
        buckets = self._buckets(batch)
        *before, final = self.blocks
        assert isinstance(final, _Block)
        hidden_BD = torch.cat(
            [
                final.last(self._states(before, bucket), bucket.word_BL, bucket.last_B)
                for bucket in self._inputs(batch, buckets)
            ]
        )
        hidden_BD = torch.empty_like(hidden_BD).index_copy(0, buckets.row_B, hidden_BD)
        # Padding is zero before the last norm, also that of a user without items.
        vector_BD: Tensor = self.norm(hidden_BD * (batch.item_BL[:, -1:] > 0))
        return vector_BD

    def item_vectors(self, batch: ItemIds) -> Tensor:
        """(M, D) rows of the item table."""
        rows: Tensor = self.items(batch.item_M)
        return rows

    def _encode(self, batch: ItemSequences) -> tuple[Tensor, Buckets]:
        """(S, D) states before the last norm, and where they are."""
        buckets = self._buckets(batch)
        parts = [self._states(self.blocks, bucket).flatten(0, 1) for bucket in self._inputs(batch, buckets)]
        return torch.cat(parts), buckets

    def _buckets(self, batch: ItemSequences) -> Buckets:
        real_BL = batch.item_BL > 0
        # Padding that attention sees is computed like items.
        length_B = (real_BL if self.config.mask_padding else torch.ones_like(real_BL)).sum(1)
        return bucketed(length_B, real_BL.shape[1])

    def _inputs(self, batch: ItemSequences, buckets: Buckets) -> Iterator[_Bucket]:
        """What the blocks read of each bucket."""
        item_S = batch.item_BL[buckets.row_S, buckets.column_S]
        # Positions count from the right edge of `max_length`, so that trimming common padding changes nothing.
        position_S = buckets.column_S + (self.config.max_length - batch.item_BL.shape[1])
        hidden_SD = torch.add(self.positions(position_S), self.items(item_S), alpha=self.config.dim**0.5)
        count = len(buckets.shapes)
        word_S = position_words(buckets.row_S + batch.rows.start, buckets.place_S) if self.dropout.active else None
        yield from map(
            _Bucket,
            buckets.split(hidden_SD),
            [None] * count if word_S is None else buckets.split(word_S),
            [None] * count if self.config.mask_padding else buckets.split((item_S > 0)[:, None]),
            buckets.last_B.split([rows for rows, _ in buckets.shapes]),
        )

    def _states(self, blocks: Iterable[nn.Module], bucket: _Bucket) -> Tensor:
        """(B, L, D) what these blocks, the first ones, make of a bucket."""
        hidden_BLD = bucket.real(self.dropout(bucket.input_BLD, bucket.word_BL))
        for block in blocks:
            hidden_BLD = bucket.real(block(hidden_BLD, bucket.word_BL))
        return hidden_BLD

    def _position_loss(self, hidden_MD: Tensor, target_M: Tensor, negative_MK: Tensor) -> Tensor:
        if self.config.loss == "full_softmax":
            table_ND = self.items(torch.arange(1, self.num_items + 1, device=target_M.device))
            return losses.catalog_softmax(hidden_MD, table_ND, target_M)
        positive_M = (hidden_MD * self.items(target_M)).sum(-1)
        # A product and a sum: with the usual single negative, half the time of a batched product.
        negative_score_MK = (hidden_MD[:, None] * self.items(negative_MK)).sum(-1)
        if self.config.loss == "bce":
            return losses.binary_cross_entropy(positive_M, negative_score_MK)
        if self.config.loss == "gbce":
            return losses.gbce(positive_M, negative_score_MK, num_items=self.num_items, t=self.config.gbce_t)
        return losses.sampled_softmax(positive_M, negative_score_MK)


@dataclass(frozen=True)
class _Bucket:
    """What the blocks read of rows that are computed together."""

    input_BLD: Tensor
    word_BL: Tensor | None
    """Words of `position_words`, if there is dropout."""
    real_BL1: Tensor | None
    """Where attention sees padding, False for padding."""
    last_B: Tensor
    """Last position of each row."""

    def real(self, x_BLD: Tensor) -> Tensor:
        """`x`, zero at padding that attention sees."""
        return x_BLD if self.real_BL1 is None else x_BLD * self.real_BL1


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

    def forward(self, x_BLD: Tensor, word_BL: Tensor | None) -> Tensor:
        """(B, L, D) states after this block."""
        return self._layers(x_BLD, word_BL, lambda x: x, self.attention)

    def last(self, x_BLD: Tensor, word_BL: Tensor | None, last_B: Tensor) -> Tensor:
        """(B, D) what `forward` gives at the positions `last_B`."""
        row_B = torch.arange(len(last_B), device=last_B.device)
        word_B1 = None if word_BL is None else word_BL[row_B, last_B][:, None]
        attend = partial(self.attention.last, last_B=last_B)
        return self._layers(x_BLD, word_B1, lambda x: x[row_B, last_B][:, None], attend)[:, 0]

    def _layers(
        self, x_BLD: Tensor, word_BQ: Tensor | None, pick: Callable[[Tensor], Tensor], attend: Callable[..., Tensor]
    ) -> Tensor:
        """States (B, Q, D) at the positions Q that `pick` selects of all.

        Args:
            attend: attention of the selected positions; of (queries, keys and values, `word_BQ`).
        """
        if self.order == "post":
            query_BQD = pick(x_BLD)
            query_BQD = self.attention_norm(query_BQD + attend(query_BQD, x_BLD, word_BQ))
            fed_BQD: Tensor = self.feed_norm(self._fed(query_BQD, query_BQD, word_BQ))
            return fed_BQD
        if self.order == "pre":
            memory_BLD = self.attention_norm(x_BLD)
            state_BQD = pick(x_BLD) + attend(pick(memory_BLD), memory_BLD, word_BQ)
            return self._fed(self.feed_norm(state_BQD), state_BQD, word_BQ)
        # "original": only queries are normalised, and the residual is the normalised query (Kang's code).
        query_BQD = self.attention_norm(pick(x_BLD))
        state_BQD = self.feed_norm(query_BQD + attend(query_BQD, x_BLD, word_BQ))
        return self._fed(state_BQD, state_BQD, word_BQ)

    def _fed(self, x_BQD: Tensor, residual_BQD: Tensor, word_BQ: Tensor | None) -> Tensor:
        """The residual plus what the feed-forward layers make of `x`."""
        hidden_BQD = self.expand_dropout.relu(self.expand(x_BQD), word_BQ)
        return self.contract_dropout.added(self.contract(hidden_BQD), residual_BQD, word_BQ)
