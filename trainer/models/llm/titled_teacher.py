"""A teacher that knows the titles: SASRec's vectors, followed by title vectors of the frozen LLM (extension).

A title's vector is the mean of its token embeddings, whitened over the catalog the teacher was trained on and of length
1. A user's is that of the sum over the latest items. The scores are those of SASRec plus the weighted cosine between
the titles of history and item: content-based filtering, with nothing trained.

Letters: B users, N items, M any items, T titles, W tokens of the LLM, E LLM's width, D teacher's width, K title
components, L events.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.config import ConfigError, LLM4RecConfig, LLMSRecConfig
from trainer.data.collators.base import BatchRows, ItemIds, ItemSequences
from trainer.models.by_id.sasrec import SASRec

COMPONENTS = 128
"""Most components of a title vector. Of equal variance, or the words that most titles share would decide."""

_BLOCK = 16_384  # titles at a time: their embeddings take 0.5 GB at a width of 4,096
_SAMPLE = 1024  # items whose scores for each other say how far the teacher's scores spread
_NEGLIGIBLE = 1e-9  # share of the largest variance below which a direction of the titles is rounding error


def title_width(system: LLM4RecConfig, llm_dim: int) -> int:
    """K, by how much the titles widen the teacher's vectors; 0: they do not."""
    return min(COMPONENTS, llm_dim) if isinstance(system, LLMSRecConfig) and system.teacher_titles else 0


class TitleSpace:
    """Title vectors of the catalog from which mean and whitening are taken, and of any other.

    Args:
        token_WE: token embeddings of the LLM.
        titles: token ids of each item's title.
    """

    def __init__(self, token_WE: Tensor, titles: Sequence[Sequence[int]]) -> None:
        width = token_WE.shape[1]
        sum_E, product_EE = (
            torch.zeros(shape, dtype=torch.float64, device="cpu") for shape in ((width,), (width, width))
        )
        for mean_TE in _means(token_WE, titles):
            sum_E += mean_TE.sum(0)
            product_EE += mean_TE.T @ mean_TE
        self._center_E = sum_E / len(titles)
        covariance_EE = product_EE / len(titles) - self._center_E.outer(self._center_E)
        variance_E, direction_EE = torch.linalg.eigh(covariance_EE)
        kept = slice(-min(COMPONENTS, len(variance_E)), None)
        variance_K, direction_EK = variance_E[kept], direction_EE[:, kept]
        # An eigenvector's sign is arbitrary: fixed, so that a checkpoint means the same with every linear algebra.
        at_K = direction_EK.abs().argmax(0, keepdim=True)
        direction_EK = direction_EK * direction_EK.gather(0, at_K).sign()
        scale_K = torch.where(variance_K > _NEGLIGIBLE * variance_E[-1], variance_K.clamp_min(1e-300).rsqrt(), 0.0)
        self._whitening_EK = direction_EK * scale_K

    def vectors(self, token_WE: Tensor, titles: Sequence[Sequence[int]]) -> Tensor:
        """(T, K) vectors of length 1."""
        parts = [((mean_TE - self._center_E) @ self._whitening_EK).float() for mean_TE in _means(token_WE, titles)]
        return F.normalize(torch.cat(parts), dim=-1)


@torch.no_grad()
def _means(token_WE: Tensor, titles: Sequence[Sequence[int]]) -> Iterator[Tensor]:
    """(T, E) mean token embeddings of blocks of titles, in float64 on the host."""
    for start in range(0, len(titles), _BLOCK):
        block = titles[start : start + _BLOCK]
        length_T = torch.tensor([len(tokens) for tokens in block])
        token_L = torch.tensor([token for tokens in block for token in tokens], dtype=torch.long)
        used_X, row_L = torch.unique(token_L, return_inverse=True)
        table_XE = token_WE[used_X.to(token_WE.device)].cpu().double()
        yield F.embedding_bag(row_L, table_XE, length_T.cumsum(0) - length_T, mode="mean")


class TitledTeacher(nn.Module):
    """Stands for its SASRec wherever a student reads a teacher's vectors.

    Args:
        token_WE: token embeddings of the LLM.
        titles: token ids of each item's title.
        weight: standard deviation of the titles' part of the scores, in those of SASRec's scores.
        latest: how many of a history's latest items count for the titles.

    Raises:
        ConfigError: the titles do not tell items apart.
    """

    title_NK: Tensor
    """Title vectors of the items, scaled; row 0 is padding."""

    def __init__(
        self, sasrec: SASRec, token_WE: Tensor, titles: Sequence[Sequence[int]], *, weight: float, latest: int
    ) -> None:
        super().__init__()
        self.sasrec = sasrec
        self._space, self._latest = TitleSpace(token_WE, titles), latest
        title_NK = self._space.vectors(token_WE, titles)
        # A score has the scale twice: in the item's vector and in the user's.
        self._scale = (weight * _spread(sasrec, title_NK)) ** 0.5
        self.register_buffer("title_NK", self._table(title_NK), persistent=False)

    @property
    def num_items(self) -> int:
        """Number of items."""
        return self.sasrec.num_items

    @property
    def dim(self) -> int:
        """D + K."""
        return self.sasrec.dim + self.title_NK.shape[1]

    def replace_titles(self, token_WE: Tensor, titles: Sequence[Sequence[int]]) -> None:
        """Take the titles of another catalog."""
        self.title_NK = self._table(self._space.vectors(token_WE, titles)).to(self.title_NK.device)

    def user_vectors(self, batch: ItemSequences) -> Tensor:
        """(B, D + K) SASRec's user vectors and those of the latest titles."""
        sum_BK = self.title_NK[batch.item_BL[:, -self._latest :]].sum(1)
        return torch.cat([self.sasrec.user_vectors(batch), F.normalize(sum_BK, dim=-1) * self._scale], -1)

    def item_vectors(self, batch: ItemIds) -> Tensor:
        """(M, D + K) rows of SASRec's item table and of the titles."""
        return torch.cat([self.sasrec.item_vectors(batch), self.title_NK[batch.item_M]], -1)

    def _table(self, title_NK: Tensor) -> Tensor:
        return F.pad(title_NK * self._scale, (0, 0, 1, 0))


@torch.no_grad()
def _spread(sasrec: SASRec, title_NK: Tensor) -> float:
    """Standard deviation of SASRec's scores in that of the titles' cosines, both after histories of one item each."""
    training = sasrec.training
    item_M = 1 + torch.linspace(0, sasrec.num_items - 1, min(_SAMPLE, sasrec.num_items)).long()
    rows = BatchRows(0, len(item_M), len(item_M))
    user_MD = sasrec.eval().user_vectors(ItemSequences(item_M[:, None], rows))
    sasrec.train(training)
    others = ~torch.eye(len(item_M), dtype=torch.bool)
    own, cosine = user_MD @ sasrec.item_vectors(ItemIds(item_M)).T, title_NK[item_M - 1] @ title_NK[item_M - 1].T
    if len(cosine) < 3 or not float(cosine[others].std()) > 0.0:
        raise ConfigError("system.teacher_titles: the titles of the dataset do not tell items apart: leave it out")
    return float(own[others].std() / cosine[others].std())
