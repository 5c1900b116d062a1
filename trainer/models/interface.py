"""What every recommender offers: terms of a batch, the loss of those terms, and a way to score items.

The training loss couples users (uniformity, in-batch contrast), and a batch is spread over ranks. So the module's
`forward`, which is all that DeepSpeed hooks, returns *terms*: small tensors with one row per user. The engine
all-gathers the rows, and `loss` turns them into the loss of the global batch. It has no parameters and is the same
function at any number of ranks; models never learn that there are ranks.

The protocols are generic in what passes through them, so that mypy checks that a model reads the batches its collator
makes, and that `loss` reads the terms that `forward` returns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

from torch import Tensor

from trainer.nn.module import Module

TrainBatchT = TypeVar("TrainBatchT", contravariant=True)
TermsT = TypeVar("TermsT", bound=NamedTuple)
HistoryBatchT = TypeVar("HistoryBatchT", contravariant=True)
ItemBatchT = TypeVar("ItemBatchT", contravariant=True)


@dataclass(frozen=True)
class Losses:
    """The training loss and its parts by name, weights not applied to the parts."""

    total: Tensor
    parts: Mapping[str, Tensor]


class Recommender(Module, Protocol[TrainBatchT, TermsT]):
    """An `nn.Module` that the engine trains."""

    def forward(self, batch: TrainBatchT) -> TermsT:
        """Terms of a training batch: a named tuple of tensors, one row per user."""

    def loss(self, terms: TermsT) -> Losses:
        """Loss of the global batch from the terms of all its users."""


class VectorModel(Module, Protocol[HistoryBatchT, ItemBatchT]):
    """An `nn.Module` whose scores are inner products of user and item vectors."""

    def user_vectors(self, batch: HistoryBatchT) -> Tensor:
        """(B, D) vectors of the collator's `histories` batch."""

    def item_vectors(self, batch: ItemBatchT) -> Tensor:
        """(M, D) vectors of the collator's `items` batch."""


class VectorRecommender(
    Recommender[TrainBatchT, TermsT],
    VectorModel[HistoryBatchT, ItemBatchT],
    Protocol[TrainBatchT, TermsT, HistoryBatchT, ItemBatchT],
):
    """Trains, and scores by vectors."""
