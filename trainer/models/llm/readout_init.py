"""Initialisation of the read-outs f_user and f_item from data, before the first step.

Behind a frozen LLM, the hidden states of different users have a cosine above 0.99 and items likewise: heads with random
weights start with scores that are nearly equal, and training spends its first steps on telling anything apart.

Letters: B users, M items, X samples of either.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from trainer.data.collators.retrieval import ItemPrompts, UserPrompts
from trainer.models.llm.retrieval import LLM4Rec

_SMALLEST_DEVIATION = 1e-6  # added, so that constant hidden dimensions do not divide by zero


@torch.no_grad()
def standardize(model: LLM4Rec, users: Sequence[UserPrompts], items: Sequence[ItemPrompts]) -> None:
    """Initialise f_user and f_item for standardized hidden states, with scores of standard deviation 1 on a sample.

    The sample's mean and deviation of each hidden dimension are folded into the first layer, so that the heads have the
    same size and can represent the same functions as before.
    """
    hidden_BD = torch.cat([model.users_hidden(batch) for batch in users])
    hidden_MD = torch.cat([model.items_hidden(batch) for batch in items])
    for head, hidden_XD in ((model.user_head, hidden_BD), (model.item_head, hidden_MD)):
        first = head[0]
        assert isinstance(first, nn.Linear)
        # Between passes the weights may be on the host.
        mean_D, deviation_D = (statistic.to(first.weight.device) for statistic in (hidden_XD.mean(0), hidden_XD.std(0)))
        first.weight.div_(deviation_D + _SMALLEST_DEVIATION)
        # With the weight divided already: W (h - mean) / std + b = W' h + (b - W' mean).
        first.bias.sub_(first.weight @ mean_D)
    # Both heads get half of the scale: a score is a product of their outputs.
    scale = (model.user_head(hidden_BD) @ model.item_head(hidden_MD).T).std() ** -0.5
    for head in (model.user_head, model.item_head):
        last = head[-1]
        assert isinstance(last, nn.Linear)
        last.weight.mul_(scale.to(last.weight.device))
        last.bias.mul_(scale.to(last.weight.device))
