"""How a system scores items for evaluation and recommendation: by vectors, or by the likelihood of titles.

Letters: B users, M items, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from trainer.data.collators.base import HistoryBatch, VectorCollator, to_device
from trainer.data.reading.counter_rng import IntArray
from trainer.data.reading.histories import Histories
from trainer.models.interface import VectorModel

if TYPE_CHECKING:  # systems without an LLM need neither of these, and transformers takes seconds to import
    from trainer.data.collators.generation import TitleCollator
    from trainer.models.llm.generation import TitleGenerator

HistoryBatchT = TypeVar("HistoryBatchT", bound=HistoryBatch)
ItemBatchT = TypeVar("ItemBatchT")


class UserVectors(NamedTuple):
    """User vectors (B, D), and the number of LLM tokens in their prompts."""

    vector_BD: Tensor
    useful_tokens: int


@dataclass(frozen=True)
class VectorScoring(Generic[HistoryBatchT, ItemBatchT]):
    """Scores are inner products of user and item vectors, in fp32."""

    model: VectorModel[HistoryBatchT, ItemBatchT]
    collator: VectorCollator[HistoryBatchT, ItemBatchT]
    costly_items: bool = False
    """Whether each item vector takes a pass through a language model or text encoder, so that they are worth keeping;
    False where they are rows of a table."""

    def user_vectors(self, histories: Histories, device: torch.device) -> UserVectors:
        """(B, D) one vector per history."""
        batch = self.collator.histories(histories)
        return UserVectors(self.model.user_vectors(to_device(batch, device)).float(), batch.useful_tokens)

    def item_vectors(self, item_M: IntArray, device: torch.device) -> Tensor:
        """(M, D) one vector per item id."""
        return self.model.item_vectors(to_device(self.collator.items(item_M), device)).float()


@dataclass(frozen=True)
class TitleScoring:
    """Scores are mean log-likelihoods, per token, of the candidates' titles (next-item-title generation)."""

    model: TitleGenerator
    collator: TitleCollator
