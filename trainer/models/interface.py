"""The interface of every recommender: terms of a batch, the loss of those terms, and vectors that score items.

The training loss couples users (uniformity, in-batch contrast), and a batch is spread over ranks. Therefore `forward`,
the only method that DeepSpeed hooks, returns *terms*: small tensors with one row per user. The engine all-gathers the
rows, and `loss` computes the loss of the global batch from them. It uses no parameters and is the same function at any
number of ranks, so that models need not know about ranks.

The protocols are generic in their batches and terms, so that mypy checks that a model reads the batches its collator
builds, and that `loss` reads the terms that `forward` returns.
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
    """The training loss, and its unweighted parts by name."""

    total: Tensor
    parts: Mapping[str, Tensor]


class Recommender(Module, Protocol[TrainBatchT, TermsT]):
    """An `nn.Module` that the engine trains."""

    def forward(self, batch: TrainBatchT) -> TermsT:
        """Terms of a training batch: a named tuple of tensors with one row per user.

        It may also hold integers: facts about the global batch that every rank knows, passed on to `loss` as they are.
        """

    def loss(self, terms: TermsT) -> Losses:
        """Loss of the global batch from the terms of all its users.

        It should read no values (`item`, boolean masks): the host would wait for the device before the backward pass.
        """


class VectorModel(Module, Protocol[HistoryBatchT, ItemBatchT]):
    """An `nn.Module` whose scores are inner products of user and item vectors."""

    def user_vectors(self, batch: HistoryBatchT) -> Tensor:
        """(B, D) user vectors of a batch of the collator's `histories`."""

    def item_vectors(self, batch: ItemBatchT) -> Tensor:
        """(M, D) item vectors of a batch of the collator's `items`."""


class VectorRecommender(
    Recommender[TrainBatchT, TermsT],
    VectorModel[HistoryBatchT, ItemBatchT],
    Protocol[TrainBatchT, TermsT, HistoryBatchT, ItemBatchT],
):
    """A recommender that scores by vectors."""
