"""LLM-SRec (KDD'25, §3): a frozen LLM reads a history, a frozen SASRec is distilled into its read-out.

Letters: B users, C candidates, P item prompts, S slots, V put-in vectors, D projected width, M items.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.config import LLMSRecConfig
from trainer.data.batches import ItemIds, ItemPrompts, ItemSequences, RetrievalTraining, UserPrompts
from trainer.data.packing import PackedPrompts
from trainer.models.interface import Losses
from trainer.models.sasrec import SASRec
from trainer.nn import losses
from trainer.nn.backbone import FrozenLLM
from trainer.nn.projectors import LearnedToken, item_projector, readout_head, teacher_head

_SMALLEST_DEVIATION = 1e-6


class RetrievalTerms(NamedTuple):
    """What the loss needs of each user: candidate scores (target first), student and teacher vectors."""

    score_BC: Tensor
    student_BD: Tensor
    teacher_BD: Tensor


class LLMSRec(nn.Module):
    """Trains f_I, f_user, f_item, f_CF-user, [UserOut] and [ItemOut]; the LLM and the teacher stay frozen."""

    def __init__(self, config: LLMSRecConfig, llm: FrozenLLM, teacher: SASRec) -> None:
        super().__init__()
        self.config = config
        self.llm = llm
        self.teacher = teacher.requires_grad_(False)
        self.item_projector = item_projector(teacher.config.dim, llm.dim)
        self.user_head = readout_head(llm.dim, config.hidden_dim, config.projected_dim)
        self.item_head = readout_head(llm.dim, config.hidden_dim, config.projected_dim)
        self.teacher_head = teacher_head(teacher.config.dim, config.projected_dim)
        self.user_out = LearnedToken(llm.token_table())
        self.item_out = LearnedToken(llm.token_table())

    def forward(self, batch: RetrievalTraining) -> RetrievalTerms:
        """Scores of each user's candidates, and both user vectors."""
        users = len(batch.candidate_BC)
        hidden_PD = self._read(batch.prompts, users)
        user_BD = self.user_head(hidden_PD[:users])
        item_PD = self.item_head(hidden_PD[users:])
        score_BC = torch.einsum("bd,bcd->bc", user_BD, item_PD[batch.candidate_BC])
        return RetrievalTerms(score_BC, user_BD, self.teacher_head(self._teacher_vectors(batch.sequence)))

    def loss(self, terms: RetrievalTerms) -> Losses:
        """Equation 4: retrieval + distillation + uniformity, over the users of the global batch."""
        student_BD, teacher_BD = terms.student_BD, terms.teacher_BD
        if self.config.distill_normalize:
            student_BD, teacher_BD = F.normalize(student_BD, dim=-1), F.normalize(teacher_BD, dim=-1)
        retrieval = losses.retrieval(terms.score_BC).mean()
        distillation = self._distillation(student_BD, teacher_BD).mean()
        uniformity = losses.uniformity(student_BD) + losses.uniformity(teacher_BD)
        total = retrieval + self.config.distill_weight * distillation + self.config.uniformity_weight * uniformity
        parts = {"retrieval": retrieval, "distillation": distillation, "uniformity": uniformity}
        return Losses(total, {name: part.detach() for name, part in parts.items()})

    def user_vectors(self, batch: UserPrompts) -> Tensor:
        """f_user(h_U), (B, D)."""
        users = len(batch.prompts.readout_P)
        vectors: Tensor = self.user_head(self._read(batch.prompts, users))
        return vectors

    def item_vectors(self, batch: ItemPrompts) -> Tensor:
        """f_item(h_I), (M, D)."""
        vectors: Tensor = self.item_head(self._read(batch.prompts, 0))
        return vectors

    @torch.no_grad()
    def standardize_readouts(self, users: Sequence[UserPrompts], items: Sequence[ItemPrompts]) -> None:
        """Start f_user and f_item on a sample's standardized hidden states, with scores of standard deviation 1.

        The mean and deviation of each hidden dimension are folded into the first layer, so the functions that the
        heads can be, and their size, stay the same.
        """
        hidden_BD = torch.cat([self._read(batch.prompts, len(batch.prompts.readout_P)) for batch in users])
        hidden_MD = torch.cat([self._read(batch.prompts, 0) for batch in items])
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

    def train(self, mode: bool = True) -> LLMSRec:
        """The teacher follows only when its dropout is asked for."""
        super().train(mode)
        self.teacher.train(mode and self.config.teacher_dropout)
        return self

    def _read(self, prompts: PackedPrompts, users: int) -> Tensor:
        """Hidden states at the read-outs; the first `users` prompts end in [UserOut], the others in [ItemOut]."""
        is_item_S = prompts.slot_item_S > 0
        with torch.no_grad():
            row_XD = self.teacher.item_vectors(ItemIds(prompts.slot_item_S[is_item_S]))
        token_2D = torch.cat([self.user_out(1), self.item_out(1)])
        vector_SD = token_2D[(prompts.slot_prompt_S >= users).long()]
        vector_SD = vector_SD.index_put((is_item_S,), self.item_projector(row_XD))
        hidden: Tensor = self.llm(prompts, vector_SD)
        return hidden

    @torch.no_grad()
    def _teacher_vectors(self, sequence: ItemSequences) -> Tensor:
        return self.teacher.user_vectors(sequence)

    def _distillation(self, student_BD: Tensor, teacher_BD: Tensor) -> Tensor:
        if self.config.distillation == "mse":
            return losses.distillation(student_BD, teacher_BD, self.config.mse_reduction)
        return losses.contrastive_distillation(
            student_BD, teacher_BD, self.config.contrastive_temperature, self.config.contrastive_symmetric
        )
