"""Terms of systems whose loss sums over the positions of each user.

Letters: B users, L positions, M positions of the batch that have a loss.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from trainer.models.interface import Losses


class SequenceTerms(NamedTuple):
    """Summed loss of each user's positions, and their number."""

    loss_B: Tensor
    count_B: Tensor


def by_user(loss_M: Tensor, position_M: Tensor, target_BL: Tensor) -> SequenceTerms:
    """Terms of a batch from the losses at `position_M`, the positions of `target_BL` that have a target."""
    rows, width = target_BL.shape
    loss_B = torch.zeros(rows, dtype=loss_M.dtype, device=loss_M.device).index_add(0, position_M // width, loss_M)
    return SequenceTerms(loss_B, (target_BL > 0).sum(1).to(loss_M.dtype))


def mean_over_positions(terms: SequenceTerms, name: str) -> Losses:
    """Mean over all positions of the global batch: users with more positions weigh more."""
    total = terms.loss_B.sum() / terms.count_B.sum().clamp(min=1)
    return Losses(total, {name: total.detach()})


def mean_over_users(terms: SequenceTerms, name: str) -> Losses:
    """Mean over users of the mean over each user's positions: all users weigh the same."""
    total = (terms.loss_B / terms.count_B.clamp(min=1)).mean()
    return Losses(total, {name: total.detach()})
