"""How a system scores items for evaluation and recommendation: by vectors, or by the likelihood of titles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from trainer.data.collators.base import HistoryBatch, VectorCollator, to_device
from trainer.data.reading.counter_rng import IntArray
from trainer.data.reading.histories import Histories
from trainer.models.interface import VectorModel

if TYPE_CHECKING:  # systems without an LLM need neither, and transformers takes seconds to import
    from trainer.data.collators.generation import TitleCollator
    from trainer.models.llm.generation import TitleGenerator

HistoryBatchT = TypeVar("HistoryBatchT", bound=HistoryBatch)
ItemBatchT = TypeVar("ItemBatchT")


class UserVectors(NamedTuple):
    """(B, D) vectors of users, and the LLM tokens of their prompts."""

    vector_BD: Tensor
    useful_tokens: int


@dataclass(frozen=True)
class VectorScoring(Generic[HistoryBatchT, ItemBatchT]):
    """A score is the inner product of a user's and an item's vector, in fp32."""

    model: VectorModel[HistoryBatchT, ItemBatchT]
    collator: VectorCollator[HistoryBatchT, ItemBatchT]

    def user_vectors(self, histories: Histories, device: torch.device) -> UserVectors:
        """One vector per history."""
        batch = self.collator.histories(histories)
        return UserVectors(self.model.user_vectors(to_device(batch, device)).float(), batch.useful_tokens)

    def item_vectors(self, item_M: IntArray, device: torch.device) -> Tensor:
        """(M, D) one vector per item id."""
        return self.model.item_vectors(to_device(self.collator.items(item_M), device)).float()


@dataclass(frozen=True)
class TitleScoring:
    """A score is the mean log-likelihood of a candidate's title (next-item-title generation)."""

    model: TitleGenerator
    collator: TitleCollator
