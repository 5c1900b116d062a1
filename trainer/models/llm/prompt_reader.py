"""The frozen LLM with the embeddings that are injected into its prompts: the only place where systems run it.

Letters: B users, P prompts, S slots, of which K receive learned tokens, I item vectors and V user vectors, R read-outs,
D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer.data.collators.base import ItemIds, ItemSequences
from trainer.data.prompts.packing import PackedPrompts
from trainer.models.by_id.sasrec import SASRec
from trainer.models.llm.titled_teacher import TitledTeacher
from trainer.nn.dropout import TokenHashes
from trainer.nn.llm.backbone import FrozenLLM


class PromptReader(nn.Module):
    """Trains the projectors and the adapters in the LLM; the LLM itself and the teacher stay frozen.

    Args:
        teacher: source of item and user vectors; None where prompts contain neither.
        item_projector: f_I, from rows of the teacher's item table to injected embeddings.
        user_projector: f_U, from the teacher's user vectors to injected embeddings.
        adapters: the token address that the dropout of adapters reads; None without adapters.
        teacher_dropout: keep the teacher's dropout on in training.
    """

    def __init__(
        self,
        llm: FrozenLLM,
        *,
        teacher: SASRec | TitledTeacher | None = None,
        item_projector: nn.Module | None = None,
        user_projector: nn.Module | None = None,
        adapters: TokenHashes | None = None,
        teacher_dropout: bool = False,
    ) -> None:
        super().__init__()
        self.llm = llm
        self.teacher = None if teacher is None else teacher.requires_grad_(False)
        self.item_projector = item_projector
        self.user_projector = user_projector
        self._adapters = adapters
        self._teacher_dropout = teacher_dropout

    def forward(self, prompts: PackedPrompts, user_BD: Tensor | None, learned_KD: Tensor) -> Tensor:
        """Hidden states at the read-outs, (R, D), in the order of the prompts.

        Args:
            user_BD: the teacher's vectors for the users' slots, in order; None for prompts of items.
            learned_KD: learned tokens for the read-outs' slots, in order.
        """
        if self._adapters is not None and self.training:
            # The engine seeds all ranks alike before each forward pass, so that they all draw the same seed here.
            self._adapters.set(int(torch.randint(2**31, (), device="cpu")), prompts)
        hidden_RD: Tensor = self.llm(prompts, self._slot_vectors(prompts, user_BD, learned_KD))
        return hidden_RD

    @torch.no_grad()
    def user_vectors(self, sequence: ItemSequences | None) -> Tensor | None:
        """The teacher's user vectors, (B, teacher's width); None without a teacher or without sequences."""
        if self.teacher is None or sequence is None:
            return None
        return self.teacher.user_vectors(sequence)

    def train(self, mode: bool = True) -> PromptReader:
        """Set the mode; the teacher stays in evaluation mode unless its dropout is asked for."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.train(mode and self._teacher_dropout)
        return self

    def _slot_vectors(self, prompts: PackedPrompts, user_BD: Tensor | None, learned_KD: Tensor) -> Tensor:
        item_S = prompts.slot_item_S
        vector_SD = torch.zeros(len(item_S), self.llm.dim, device=item_S.device)
        vector_SD[prompts.learned_K] = learned_KD
        if self.item_projector is not None:
            assert self.teacher is not None
            with torch.no_grad():
                row_ID = self.teacher.item_vectors(ItemIds(item_S[prompts.shown_I]))
            vector_SD[prompts.shown_I] = self.item_projector(row_ID)
        if self.user_projector is not None and user_BD is not None:
            user_VD = self.user_projector(user_BD)
            if prompts.user_prompt_V is not None:
                user_VD = user_VD[prompts.user_prompt_V]
            vector_SD[prompts.user_V] = user_VD
        return vector_SD
