"""Retrieval with an LLM (LLM-SRec, KDD'25, Table 2 and Equation 1): one architecture for five recommenders.

The LLM reads a user's history up to [UserOut] and an item's title up to [ItemOut]; their score is the inner product
of the two projected hidden states. Which vectors stand in the prompts is `PromptReader`'s business, see `llm_rows.py`
for what tells the systems apart.

Letters: B users, T targets of all of them, W targets of a user, C candidates, P item prompts, D projected width,
M items.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from trainer.config import LLM4RecConfig
from trainer.data.collators.retrieval import ItemPrompts, RetrievalTraining, UserPrompts
from trainer.models.interface import Losses
from trainer.models.llm.distillation import Distillation
from trainer.models.llm.prompt_reader import PromptReader
from trainer.nn import losses
from trainer.nn.projectors import LearnedToken, readout_head

_SMALLEST_DEVIATION = 1e-6


class RetrievalTerms(NamedTuple):
    """What the loss needs of each user's targets: which there are, and the scores of their candidates, target first."""

    real_BW: Tensor
    """1 for a target, 0 for the rest of a shorter row."""
    score_BWC: Tensor


class DistilledTerms(NamedTuple):
    """The same, and the vectors of student and teacher before each target."""

    real_BW: Tensor
    score_BWC: Tensor
    student_BWD: Tensor
    teacher_BWD: Tensor


class LLM4Rec(nn.Module):
    """Trains f_user, f_item, [UserOut] and [ItemOut], and what trains in the parts it is given."""

    def __init__(self, config: LLM4RecConfig, reader: PromptReader, distillation: Distillation | None = None) -> None:
        super().__init__()
        self.reader = reader
        llm = reader.llm
        self.user_head = readout_head(llm.dim, config.hidden_dim, config.projected_dim)
        self.item_head = readout_head(llm.dim, config.hidden_dim, config.projected_dim)
        self.distillation = distillation
        self.user_out = LearnedToken(llm.token_table())
        self.item_out = LearnedToken(llm.token_table())

    def forward(self, batch: RetrievalTraining) -> RetrievalTerms | DistilledTerms:
        """Scores of each target's candidates, and both user vectors where there is a distillation."""
        targets = len(batch.candidate_YC)
        teacher_YD = self.reader.user_vectors(batch.sequence)
        learned = torch.cat([self.user_out(targets), self.item_out(len(batch.prompts.readout_R) - targets)])
        hidden = self.reader(batch.prompts, teacher_YD, learned)
        user_YD, item_PD = self.user_head(hidden[:targets]), self.item_head(hidden[targets:])
        score_YC = torch.einsum("yd,ycd->yc", user_YD, item_PD[batch.candidate_YC])
        real_BW = _by_user(torch.ones_like(score_YC[:, :1]), batch)[..., 0]
        if self.distillation is None:
            return RetrievalTerms(real_BW, _by_user(score_YC, batch))
        vectors = (user_YD, self.distillation(teacher_YD))
        return DistilledTerms(real_BW, *(_by_user(x_YX, batch) for x_YX in (score_YC, *vectors)))

    def loss(self, terms: RetrievalTerms | DistilledTerms) -> Losses:
        """Equation 1, plus the weighted losses of the distillation (Equation 4), over the global batch's targets."""
        real_BW = terms.real_BW > 0
        total = losses.retrieval(terms.score_BWC[real_BW]).mean()
        parts = {"retrieval": total}
        if isinstance(terms, DistilledTerms):
            assert self.distillation is not None
            more, of_distillation = self.distillation.loss(terms.student_BWD[real_BW], terms.teacher_BWD[real_BW])
            total, parts = total + more, parts | of_distillation
        return Losses(total, {name: part.detach() for name, part in parts.items()})

    def user_vectors(self, batch: UserPrompts) -> Tensor:
        """f_user(h_U), (B, D)."""
        vectors: Tensor = self.user_head(self._users_hidden(batch))
        return vectors

    def item_vectors(self, batch: ItemPrompts) -> Tensor:
        """f_item(h_I), (M, D)."""
        vectors: Tensor = self.item_head(self._items_hidden(batch))
        return vectors

    @torch.no_grad()
    def standardize_readouts(self, users: Sequence[UserPrompts], items: Sequence[ItemPrompts]) -> None:
        """Start f_user and f_item on a sample's standardized hidden states, with scores of standard deviation 1.

        The mean and deviation of each hidden dimension are folded into the first layer, so the functions that the
        heads can be, and their size, stay the same.
        """
        hidden_BD = torch.cat([self._users_hidden(batch) for batch in users])
        hidden_MD = torch.cat([self._items_hidden(batch) for batch in items])
        for head, hidden_XD in ((self.user_head, hidden_BD), (self.item_head, hidden_MD)):
            first = head[0]
            assert isinstance(first, nn.Linear)
            first.weight.div_(hidden_XD.std(0) + _SMALLEST_DEVIATION)
            first.bias.sub_(first.weight @ hidden_XD.mean(0))
        scale = (self.user_head(hidden_BD) @ self.item_head(hidden_MD).T).std() ** -0.5
        for head in (self.user_head, self.item_head):
            last = head[-1]
            assert isinstance(last, nn.Linear)
            last.weight.mul_(scale)
            last.bias.mul_(scale)

    def _users_hidden(self, batch: UserPrompts) -> Tensor:
        teacher_BD = self.reader.user_vectors(batch.sequence)
        hidden_BD: Tensor = self.reader(batch.prompts, teacher_BD, self.user_out(len(batch.prompts.readout_R)))
        return hidden_BD

    def _items_hidden(self, batch: ItemPrompts) -> Tensor:
        hidden_MD: Tensor = self.reader(batch.prompts, None, self.item_out(len(batch.prompts.readout_R)))
        return hidden_MD


def _by_user(x_YX: Tensor, batch: RetrievalTraining) -> Tensor:
    """(B, W, X): the rows of each user's targets, zeros where a user has fewer than others."""
    users = len(batch.user_B)
    table = x_YX.new_zeros(users * batch.targets, x_YX.shape[1]).index_put((batch.slot_Y,), x_YX)
    return table.view(users, batch.targets, x_YX.shape[1])
