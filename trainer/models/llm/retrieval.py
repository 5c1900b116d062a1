"""Retrieval with an LLM (LLM-SRec, KDD'25, Table 2 and Equation 1): one architecture for five recommenders.

The LLM reads a user's history up to [UserOut] and an item's title up to [ItemOut]; their score is the inner product
of the two projected hidden states. `PromptReader` injects vectors into the prompts; `variants.py` lists how the systems
differ.

Letters: B users, Y targets of all users, W targets per user (padded), C candidates, P item prompts, D projected width,
M items, X any axis, or the items that a user of the batch encodes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.config import LLM4RecConfig
from trainer.data.collators.base import ItemIds
from trainer.data.collators.retrieval import BatchItems, ItemPrompts, RetrievalTraining, UserPrompts
from trainer.models.interface import Losses
from trainer.models.llm.distillation import Distillation
from trainer.models.llm.prompt_reader import PromptReader
from trainer.nn import losses
from trainer.nn.projectors import LearnedToken, TokenScale, readout_head


class RetrievalTerms(NamedTuple):
    """Which targets each user has, and the scores of their candidates, the target first."""

    real_BW: Tensor
    """1 for a target, 0 for padding."""
    score_BWC: Tensor
    targets: int
    """See `RetrievalTraining.all_targets`."""


class DistilledTerms(NamedTuple):
    """`RetrievalTerms`, and the user vectors of student and teacher before each target."""

    real_BW: Tensor
    score_BWC: Tensor
    student_BWD: Tensor
    teacher_BWD: Tensor
    targets: int


class BatchTerms(NamedTuple):
    """User vectors before each target, and the items of the global batch, of which each user brings some."""

    real_BW: Tensor
    target_BW: Tensor
    """Index of the target among the items."""
    student_BWD: Tensor
    teacher_BWD: Tensor
    """Without distillation D = 0."""
    item_BXD: Tensor
    """The first M of these B X vectors are those of the items."""
    log_q_BX: Tensor
    excluded_BM: Tensor
    """See `BatchItems`, as for `log_q_BX`."""
    teacher_user_BWd: Tensor
    """The teacher's own user vectors; d = 0 if its scores are not distilled."""
    teacher_item_BXd: Tensor
    """Rows of the teacher's item table, in the order of `item_BXD`."""
    targets: int


class LLM4Rec(nn.Module):
    """Trains f_user, f_item, [UserOut] and [ItemOut], and the trained parts of `reader` and `distillation`."""

    def __init__(self, config: LLM4RecConfig, reader: PromptReader, distillation: Distillation | None = None) -> None:
        super().__init__()
        self.reader = reader
        llm = reader.llm
        self.user_head = readout_head(llm.dim, config.hidden_dim, config.projected_dim)
        self.item_head = readout_head(llm.dim, config.hidden_dim, config.projected_dim)
        self.distillation = distillation
        self._log_q = config.log_q
        scale = TokenScale.of(llm.token_table())
        self.user_out, self.item_out = LearnedToken(scale), LearnedToken(scale)

    def forward(self, batch: RetrievalTraining) -> RetrievalTerms | DistilledTerms | BatchTerms:
        """Scores of each target's candidates, with distillation also the user vectors of student and teacher."""
        targets = len(batch.candidate_YC)
        teacher_YD = self.reader.user_vectors(batch.sequence)
        # In the order of the read-outs: user prompts come first, then item prompts.
        learned = torch.cat([self.user_out(targets), self.item_out(len(batch.prompts.readout_R) - targets)])
        hidden = self.reader(batch.prompts, teacher_YD, learned)
        user_YD, item_PD = self.user_head(hidden[:targets]), self.item_head(hidden[targets:])
        if batch.batch_items is not None:
            return self._batch_terms(batch, batch.batch_items, user_YD, teacher_YD, item_PD)
        score_YC = torch.einsum("yd,ycd->yc", user_YD, item_PD[batch.candidate_YC])
        real_BW = _by_user(torch.ones_like(score_YC[:, :1]), batch)[..., 0]
        if self.distillation is None:
            return RetrievalTerms(real_BW, _by_user(score_YC, batch), batch.all_targets)
        vectors = (user_YD, self.distillation(teacher_YD))
        score_BWC, student_BWD, teacher_BWD = (_by_user(x_YX, batch) for x_YX in (score_YC, *vectors))
        return DistilledTerms(real_BW, score_BWC, student_BWD, teacher_BWD, batch.all_targets)

    def _batch_terms(
        self, batch: RetrievalTraining, items: BatchItems, user_YD: Tensor, teacher_YD: Tensor | None, item_PD: Tensor
    ) -> BatchTerms:
        users = len(batch.user_B)

        def in_shares(x_PD: Tensor) -> Tensor:
            missing = users * items.per_user - len(x_PD)  # the last users of the global batch may find no items left
            return F.pad(x_PD, (0, 0, 0, missing)).view(users, items.per_user, x_PD.shape[1])

        projected_YD, own_YD, own_PD = user_YD[:, :0], user_YD[:, :0], item_PD[:, :0]
        if self.distillation is not None:
            assert teacher_YD is not None
            assert self.reader.teacher is not None
            projected_YD = self.distillation(teacher_YD)
            if self.distillation.config.score_distill_weight:
                own_YD, own_PD = teacher_YD, self.reader.teacher.item_vectors(ItemIds(items.item_P)).detach()
        return BatchTerms(
            real_BW=_by_user(torch.ones_like(user_YD[:, :1]), batch)[..., 0],
            target_BW=_by_user(batch.candidate_YC, batch)[..., 0],
            student_BWD=_by_user(user_YD, batch),
            teacher_BWD=_by_user(projected_YD, batch),
            item_BXD=in_shares(item_PD),
            log_q_BX=items.log_q_BX,
            excluded_BM=items.excluded_BM,
            teacher_user_BWd=_by_user(own_YD, batch),
            teacher_item_BXd=in_shares(own_PD),
            targets=batch.all_targets,
        )

    def loss(self, terms: RetrievalTerms | DistilledTerms | BatchTerms) -> Losses:
        """Equation 1, plus the weighted losses of the distillation (Equation 4), over targets of the global batch."""
        at_Y = _positions_of_ones(terms.real_BW, terms.targets)
        if isinstance(terms, BatchTerms):
            parts = self._batch_losses(terms, at_Y)
        else:
            parts = {"retrieval": losses.retrieval(_rows(terms.score_BWC, at_Y)).mean()}
        total = parts["retrieval"]
        if "score_distillation" in parts:
            assert self.distillation is not None
            total = total + self.distillation.config.score_distill_weight * parts["score_distillation"]
        if self.distillation is not None:
            assert not isinstance(terms, RetrievalTerms)
            vectors = (_rows(terms.student_BWD, at_Y), _rows(terms.teacher_BWD, at_Y))
            weighted, unweighted = self.distillation.loss(*vectors)
            total, parts = total + weighted, parts | unweighted
        return Losses(total, {name: part.detach() for name, part in parts.items()})

    def _batch_losses(self, terms: BatchTerms, at_Y: Tensor) -> dict[str, Tensor]:
        """Equation 1 among the items of the global batch, and the distillation of the teacher's scores of them."""
        count = terms.excluded_BM.shape[1]
        item_MD = terms.item_BXD.flatten(0, 1)[:count]
        score_YM, target_Y = _rows(terms.student_BWD, at_Y) @ item_MD.T, _rows(terms.target_BW, at_Y)
        excluded_YM = terms.excluded_BM[at_Y // terms.real_BW.shape[1]].bool()
        excluded_YM = excluded_YM.scatter(1, target_Y[:, None], False)  # a target is one of its user's items too
        log_q_M = terms.log_q_BX.flatten()[:count] if self._log_q else None
        parts = {"retrieval": losses.batch_softmax(score_YM, target_Y, excluded_YM, log_q_M).mean()}
        if terms.teacher_user_BWd.shape[-1]:
            table_Md = terms.teacher_item_BXd.flatten(0, 1)[:count]
            teacher_YM = _rows(terms.teacher_user_BWd, at_Y) @ table_Md.T
            parts["score_distillation"] = losses.score_distillation(score_YM, teacher_YM, excluded_YM).mean()
        return parts

    def user_vectors(self, batch: UserPrompts) -> Tensor:
        """(B, D) f_user(h_U)."""
        vectors: Tensor = self.user_head(self.users_hidden(batch))
        return vectors

    def item_vectors(self, batch: ItemPrompts) -> Tensor:
        """(M, D) f_item(h_I)."""
        vectors: Tensor = self.item_head(self.items_hidden(batch))
        return vectors

    def users_hidden(self, batch: UserPrompts) -> Tensor:
        """(B, LLM's width) hidden states at [UserOut]."""
        teacher_BD = self.reader.user_vectors(batch.sequence)
        hidden_BD: Tensor = self.reader(batch.prompts, teacher_BD, self.user_out(len(batch.prompts.readout_R)))
        return hidden_BD

    def items_hidden(self, batch: ItemPrompts) -> Tensor:
        """(M, LLM's width) hidden states at [ItemOut]."""
        hidden_MD: Tensor = self.reader(batch.prompts, None, self.item_out(len(batch.prompts.readout_R)))
        return hidden_MD


def _positions_of_ones(real_BW: Tensor, targets: int) -> Tensor:
    """(Y,) positions of the `targets` ones in the flattened table, ascending.

    `real_BW > 0` as an index would give the same rows, but its entries would have to be counted first: the host would
    wait for the device, and a device that compiles graphs cannot have shapes that depend on values.
    """
    real_X = real_BW.flatten() > 0
    # The place of each one among all ones. Zeros share the place behind the last one, which is then cut off.
    place_X = torch.where(real_X, real_X.cumsum(0) - 1, targets)
    index_X = torch.arange(len(real_X), device=real_X.device)
    return index_X.new_zeros(targets + 1).scatter(0, place_X, index_X)[:targets]


def _rows(x_BWX: Tensor, at_Y: Tensor) -> Tensor:
    """(Y, ...) rows of the targets."""
    return x_BWX.flatten(0, 1)[at_Y]


def _by_user(x_YX: Tensor, batch: RetrievalTraining) -> Tensor:
    """(B, W, X) rows of each user's targets, padded with zeros."""
    users = len(batch.user_B)
    table = x_YX.new_zeros(users * batch.targets, x_YX.shape[1]).index_put((batch.slot_Y,), x_YX)
    return table.view(users, batch.targets, x_YX.shape[1])
