"""Terms of systems whose loss is a sum over positions of users.

Letters: B users, L positions, M positions of the batch that have a loss.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from trainer.models.interface import Losses


class SequenceTerms(NamedTuple):
    """Summed loss of each user's positions, and how many they are."""

    loss_B: Tensor
    count_B: Tensor


def by_user(loss_M: Tensor, real_BL: Tensor) -> SequenceTerms:
    """Terms of a batch from the losses at the places where `real_BL`, in its order."""
    rows = len(real_BL)
    user_M = torch.arange(rows, device=real_BL.device)[:, None].expand_as(real_BL)[real_BL]
    loss_B = torch.zeros(rows, dtype=loss_M.dtype, device=loss_M.device).index_add(0, user_M, loss_M)
    return SequenceTerms(loss_B, real_BL.sum(1).to(loss_M.dtype))


def mean_over_positions(terms: SequenceTerms, name: str) -> Losses:
    """Mean over all positions of the global batch: users with many count more."""
    total = terms.loss_B.sum() / terms.count_B.sum().clamp(min=1)
    return Losses(total, {name: total.detach()})


def mean_over_users(terms: SequenceTerms, name: str) -> Losses:
    """Mean over users of the mean over each user's positions: all users count alike."""
    total = (terms.loss_B / terms.count_B.clamp(min=1)).mean()
    return Losses(total, {name: total.detach()})
