"""RECFORMER (Li et al., KDD 2023): items and histories are sentences that one encoder reads.

Letters: B users, T tokens, D width of the encoder, K sampled negatives, C candidates, M items or masked words of a
batch, N items of the catalog, V words of the vocabulary.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.config.text_systems import RecformerConfig, RecformerPretrainConfig
from trainer.data.collators.sentences import ItemSentences, SentencePairs, SentenceTraining
from trainer.data.item_sentences import NOT_MASKED, TYPES, MaskedSentences, Sentences
from trainer.models.interface import Losses
from trainer.nn import losses
from trainer.nn.saved_buffers import SavedTable
from trainer.nn.text_encoder import TextEncoder, pooled

log = logging.getLogger(__name__)

_ALIKE = 0.05
"""Deviation of unit vectors from their mean (a mean cosine of 0.9975) below which every softmax is nearly uniform."""


class SentenceEncoder(nn.Module):
    """The sum of four embeddings (§2.2.2: word, token position, token type, item position), then the encoder.

    The first two are the encoder's own, as are the LayerNorm and the dropout after the sum.
    """

    def __init__(self, encoder: TextEncoder, max_items: int, pooling: str) -> None:
        super().__init__()
        self.encoder = encoder
        self.pooling = pooling
        self.types = nn.Embedding(TYPES, encoder.dim)
        self.places = nn.Embedding(max_items + 1, encoder.dim)
        for embedding in (self.types, self.places):
            nn.init.normal_(embedding.weight, std=encoder.encoder.config.initializer_range)

    def forward(self, sentences: Sentences) -> Tensor:
        """Hidden states (B, T, D)."""
        embedding_BTD = self.encoder.words()(sentences.token_BT)
        embedding_BTD = embedding_BTD + self.types(sentences.type_BT) + self.places(sentences.place_BT)
        hidden_BTD: Tensor = self.encoder(sentences.real_BT, sentences.rows, inputs_embeds=embedding_BTD)
        return hidden_BTD

    def vectors(self, sentences: Sentences) -> Tensor:
        """(B, D) unit vectors of sentences."""
        return F.normalize(pooled(self(sentences), sentences.real_BT, self.pooling), dim=-1)


class PretrainTerms(NamedTuple):
    """Unit vectors of history and next item, and for each the summed masked-word loss and number of masked words."""

    history_BD: Tensor
    item_BD: Tensor
    history_words_B: Tensor
    history_count_B: Tensor
    item_words_B: Tensor
    item_count_B: Tensor


class RecformerPretrain(nn.Module):
    """Trains the sentence encoder and a masked-word head, tied to the input word embeddings."""

    def __init__(self, config: RecformerPretrainConfig, sentence: SentenceEncoder) -> None:
        super().__init__()
        self.config = config
        self.sentence = sentence
        words = sentence.encoder.words()
        self.head = nn.Sequential(
            nn.Linear(sentence.encoder.dim, words.embedding_dim), nn.GELU(), nn.LayerNorm(words.embedding_dim)
        )
        self.word_bias = nn.Parameter(torch.zeros(words.num_embeddings))

    def forward(self, batch: SentencePairs) -> PretrainTerms:
        """Vectors of clean sentences for the contrast, and the word loss of masked ones."""
        return PretrainTerms(
            self.sentence.vectors(batch.histories),
            self.sentence.vectors(batch.items),
            *self._words(batch.masked_histories),
            *self._words(batch.masked_items),
        )

    def loss(self, terms: PretrainTerms) -> Losses:
        """L = L_IIC + 0.1 L_MLM(histories) + 0.1 L_MLM(items), over the global batch (§2.3)."""
        contrast = losses.contrastive_distillation(terms.history_BD, terms.item_BD, self.config.temperature).mean()
        history_words = terms.history_words_B.sum() / terms.history_count_B.sum().clamp(min=1)
        item_words = terms.item_words_B.sum() / terms.item_count_B.sum().clamp(min=1)
        parts = {"contrast": contrast, "history_words": history_words, "item_words": item_words}
        total = contrast + self.config.mlm_weight * (history_words + item_words)
        return Losses(total, {name: part.detach() for name, part in parts.items()})

    def user_vectors(self, batch: Sentences) -> Tensor:
        """(B, D) unit vectors of histories."""
        return self.sentence.vectors(batch)

    def item_vectors(self, batch: ItemSentences) -> Tensor:
        """(M, D) unit vectors of items."""
        return self.sentence.vectors(batch.sentences)

    def _words(self, masked: MaskedSentences) -> tuple[Tensor, Tensor]:
        """(B,) summed cross-entropy of each text's masked words, and (B,) their number."""
        hidden_MD = self.sentence(masked.sentences).flatten(0, 1)[masked.position_M]
        logit_MV = self.head(hidden_MD) @ self.sentence.encoder.words().weight.T + self.word_bias
        label_M = masked.label_BT.flatten()[masked.position_M]
        loss_M = F.cross_entropy(logit_MV.float(), label_M, reduction="none")
        rows, width = masked.label_BT.shape
        loss_B = torch.zeros(rows, device=loss_M.device).index_add(0, masked.position_M // width, loss_M)
        return loss_B, (masked.label_BT != NOT_MASKED).sum(1).to(loss_B.dtype)


class RankingTerms(NamedTuple):
    """Each user's cross-entropy."""

    loss_B: Tensor


class Recformer(nn.Module):
    """Trains the sentence encoder to find the next item in a table of item vectors that gets no gradient (§2.4)."""

    def __init__(self, config: RecformerConfig, sentence: SentenceEncoder, num_items: int) -> None:
        super().__init__()
        self.config = config
        self.sentence = sentence
        self.table = SavedTable(num_items, sentence.encoder.dim)

    def forward(self, batch: SentenceTraining) -> RankingTerms:
        """Cross-entropy of cosine / temperature, over all items or over the target (first) and sampled negatives."""
        user_BD = self.sentence.vectors(batch.histories)
        if batch.negative_BK is None:
            logit_BN = user_BD @ self.table.value.T / self.config.temperature
            return RankingTerms(losses.full_softmax(logit_BN, batch.target_B))
        candidate_BC = torch.cat([batch.target_B[:, None], batch.negative_BK], dim=1)
        score_BC = torch.einsum("bd,bcd->bc", user_BD, self.table(candidate_BC - 1))
        return RankingTerms(losses.retrieval(score_BC / self.config.temperature))

    def loss(self, terms: RankingTerms) -> Losses:
        """Mean over the users of the global batch."""
        total = terms.loss_B.mean()
        return Losses(total, {"cross_entropy": total.detach()})

    def user_vectors(self, batch: Sentences) -> Tensor:
        """(B, D) unit vectors of histories."""
        return self.sentence.vectors(batch)

    def item_vectors(self, batch: ItemSentences) -> Tensor:
        """(M, D) rows of the item table."""
        rows: Tensor = self.table(batch.item_M - 1)
        return rows

    def keep_items(self, vector_ND: Tensor) -> None:
        """Rank by these vectors (N, D) from now on; warn where they are too alike to tell items apart."""
        deviation = float((vector_ND - vector_ND.mean(0)).square().sum(1).mean().sqrt())
        if deviation < _ALIKE:
            log.warning(
                "the vectors of all items are nearly the same (%.4f from their mean): untrained, the encoder's start "
                "token says little about a text; set system.pooling=mean, or start from system.pretrained",
                deviation,
            )
        self.table.replace(vector_ND)

    def encode_items(self, batch: ItemSentences) -> Tensor:
        """(M, D) item vectors of the current encoder: rows of the next table."""
        return self.sentence.vectors(batch.sentences)
