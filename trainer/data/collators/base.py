"""Typed batches that models read, and the interfaces of the collators that build them from users.

Batches of prompts are in `retrieval.py` and `generation.py`. A training batch is one rank's share of a global batch;
`rows` says which. Everything random in it (negatives) is addressed by user, so the draws do not depend on the share.

Letters: B users of this share, L positions, M items.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from trainer.data.reading.counter_rng import IntArray
from trainer.data.reading.histories import Histories, Users

BatchT = TypeVar("BatchT")

ON_HOST = {"on_host": True}
"""Metadata of a dataclass field that no model reads on the device: `to_device` leaves it where it is."""


@dataclass(frozen=True)
class BatchRows:
    """Which rows of the global batch a batch holds."""

    start: int
    """Index of the first row."""
    count: int
    """Rows of this batch."""
    total: int
    """Rows of the global batch."""


@dataclass(frozen=True)
class ItemSequences:
    """Histories as item ids, left-padded with 0."""

    item_BL: Tensor
    rows: BatchRows

    @property
    def useful_tokens(self) -> int:
        """Always 0: no LLM reads item ids (see `HistoryBatch.useful_tokens`)."""
        return 0


@dataclass(frozen=True)
class ItemIds:
    """Item ids to encode, for models that look items up by id."""

    item_M: Tensor


class HistoryBatch(Protocol):
    """A batch of histories."""

    @property
    def useful_tokens(self) -> int:
        """LLM tokens of the batch's prompts if each were run alone; 0 for a system without an LLM."""


TrainBatchT = TypeVar("TrainBatchT", covariant=True)
HistoryBatchT = TypeVar("HistoryBatchT", bound=HistoryBatch, covariant=True)
ItemBatchT = TypeVar("ItemBatchT", covariant=True)


class TrainingCollator(Protocol[TrainBatchT]):
    """Builds training batches; picklable, because loader processes hold a copy."""

    @property
    def max_history(self) -> int:
        """Items per history that the system reads or shows in a prompt, the latest ones."""

    def train(self, users: Users, share: slice, epoch: int) -> TrainBatchT:
        """Build the batch of rows `share` of the global batch `users`."""


class VectorCollator(Protocol[HistoryBatchT, ItemBatchT]):
    """Builds the batches that user and item vectors are computed from."""

    @property
    def max_history(self) -> int:
        """Items per history that the system reads or shows in a prompt, the latest ones."""

    def histories(self, histories: Histories) -> HistoryBatchT:
        """Build the batch for the vectors of these users."""

    def items(self, item_M: IntArray) -> ItemBatchT:
        """Build the batch for the vectors of these items (ids, 1 to N)."""


class Collator(
    TrainingCollator[TrainBatchT],
    VectorCollator[HistoryBatchT, ItemBatchT],
    Protocol[TrainBatchT, HistoryBatchT, ItemBatchT],
):
    """Builds all batches of a system that scores by the inner product of user and item vectors."""


def to_device(batch: BatchT, device: torch.device) -> BatchT:
    """Move every tensor of the batch, at any depth, to `device`, except for the fields marked `ON_HOST`."""
    moved: BatchT = _map_tensors(batch, lambda tensor: tensor.to(device, non_blocking=True))
    return moved


def pin_memory(batch: BatchT) -> BatchT:
    """Copy every tensor that `to_device` moves to page-locked memory, from which CUDA copies while it computes."""
    pinned: BatchT = _map_tensors(batch, Tensor.pin_memory)
    return pinned


def _map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        return tuple(_map_tensors(part, change) for part in value)
    if is_dataclass(value) and not isinstance(value, type):
        parts = {field.name: getattr(value, field.name) for field in fields(value)}
        moved = [field.name for field in fields(value) if not field.metadata.get("on_host")]
        return type(value)(**parts | {name: _map_tensors(parts[name], change) for name in moved})
    return value


def positions_with_loss(target_BL: IntArray) -> Tensor:
    """(M,) positions whose target is not 0, as indices into the flattened table.

    Models index by these rather than by the mask `target_BL > 0`, whose entries would have to be counted first: the
    host would wait for the device.
    """
    return torch.from_numpy(np.flatnonzero(target_BL))


def batch_rows(users: Users, share: slice) -> BatchRows:
    """Rows `share` of the global batch `users`, as `BatchRows`."""
    return BatchRows(share.start, share.stop - share.start, len(users))
