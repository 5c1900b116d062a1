"""What every recommender offers: terms of a batch, the loss of those terms, user and item vectors.

The training loss couples users (uniformity, in-batch contrast), and a batch is spread over ranks. So the module's
`forward`, which is all that DeepSpeed hooks, returns *terms*: small tensors with one row a user. The engine gathers
the rows of all ranks, and `loss` turns them into the loss of the global batch. It has no parameters and is the same
function at any number of ranks; models never learn that there are ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor


@dataclass(frozen=True)
class Losses:
    """The training loss and its parts by name, weights not applied to the parts."""

    total: Tensor
    parts: Mapping[str, Tensor]


class Recommender(Protocol):
    """An `nn.Module` that the engine trains and the evaluator ranks with.

    Scores are inner products of user and item vectors.
    """

    def __call__(self, batch: Any) -> NamedTuple:
        """Terms of a training batch: a named tuple of tensors, one row a user."""

    def loss(self, terms: Any) -> Losses:
        """Loss of the global batch from the terms of all its users."""

    def user_vectors(self, batch: Any) -> Tensor:
        """(B, D) vectors of the collator's `histories` batch."""

    def item_vectors(self, batch: Any) -> Tensor:
        """(M, D) vectors of the collator's `items` batch."""
