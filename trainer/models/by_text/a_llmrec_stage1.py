"""Stage 1 of A-LLMRec (Kim et al., KDD 2024, §3.1): items of a frozen SASRec and their texts share one latent space.

Letters: B users, P = 2B items (targets and negatives, alternating), D width of the teacher's vectors, F of the text
encoder's, Z of the latent space, M items.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.config.text_systems import ALLMRecStage1Config
from trainer.data.collators.base import ItemIds, ItemSequences
from trainer.data.collators.item_texts import ItemPairs
from trainer.models.by_id.sasrec import SASRec
from trainer.models.interface import Losses
from trainer.nn.saved_buffers import SavedTable
from trainer.nn.text_encoder import TextVectors


class Stage1Terms(NamedTuple):
    """Parts of the loss, one value per user each, target and negative summed."""

    recommendation_B: Tensor
    matching_B: Tensor
    item_B: Tensor
    text_B: Tensor


class AutoEncoder(nn.Module):
    """Linear D -> Z and sigmoid to encode, linear Z -> D to decode."""

    def __init__(self, dim: int, latent_dim: int) -> None:
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(dim, latent_dim), nn.Sigmoid())
        self.decode = nn.Linear(latent_dim, dim)


class ALLMRecStage1(nn.Module):
    """Trains both auto-encoders and, unless text vectors are precomputed, the text encoder; the teacher is frozen.

    Args:
        texts: the trained encoder, or the precomputed text vectors of items 0 to N.
    """

    def __init__(self, config: ALLMRecStage1Config, teacher: SASRec, texts: TextVectors | SavedTable) -> None:
        super().__init__()
        self.config = config
        self.teacher = teacher.requires_grad_(False)
        self.texts = texts
        width = texts.encoder.dim if isinstance(texts, TextVectors) else texts.value.shape[1]
        self.item_coder = AutoEncoder(teacher.config.dim, config.latent_dim)
        self.text_coder = AutoEncoder(width, config.latent_dim)

    def forward(self, batch: ItemPairs) -> Stage1Terms:
        """The four parts of the loss, per user."""
        with torch.no_grad():
            user_BD = self.teacher.user_vectors(batch.sequence)
            item_PD = self.teacher.item_vectors(ItemIds(batch.item_P))
        text_PF = self.texts(batch.texts) if isinstance(self.texts, TextVectors) else self.texts(batch.item_P)
        item_PZ, text_PZ = self.item_coder.encode(item_PD), self.text_coder.encode(text_PF)
        decoded_PD = self.item_coder.decode(item_PZ)
        score_B2 = (user_BD[:, None] * decoded_PD.view(len(user_BD), 2, user_BD.shape[1])).mean(-1)
        return Stage1Terms(
            recommendation_B=-F.logsigmoid(score_B2[:, 0]) - F.logsigmoid(-score_B2[:, 1]),
            matching_B=_square_error(item_PZ, text_PZ),
            item_B=_square_error(decoded_PD, item_PD),
            # Detached: the text encoder must not learn vectors that are merely easy to reconstruct.
            text_B=_square_error(self.text_coder.decode(text_PZ), text_PF.detach()),
        )

    def loss(self, terms: Stage1Terms) -> Losses:
        """L = L_rec + L_matching + 0.5 L_item-rec + 0.2 L_text-rec, each a mean over the users of the global batch."""
        parts = {
            "recommendation": terms.recommendation_B.mean(),
            "matching": terms.matching_B.mean(),
            "item_reconstruction": terms.item_B.mean(),
            "text_reconstruction": terms.text_B.mean(),
        }
        total = (
            parts["recommendation"]
            + self.config.matching_weight * parts["matching"]
            + self.config.item_weight * parts["item_reconstruction"]
            + self.config.text_weight * parts["text_reconstruction"]
        )
        return Losses(total, {name: part.detach() for name, part in parts.items()})

    def user_vectors(self, batch: ItemSequences) -> Tensor:
        """(B, D) user vectors of the teacher."""
        return self.teacher.user_vectors(batch)

    def item_vectors(self, batch: ItemIds) -> Tensor:
        """(M, D) item vectors of the teacher, encoded and decoded by the auto-encoder."""
        decoded_MD: Tensor = self.item_coder.decode(self.item_coder.encode(self.teacher.item_vectors(batch)))
        return decoded_MD

    def train(self, mode: bool = True) -> ALLMRecStage1:
        """Set the mode; the teacher stays in evaluation mode."""
        super().train(mode)
        self.teacher.train(False)
        return self


def _square_error(x_PD: Tensor, y_PD: Tensor) -> Tensor:
    """(B,) squared difference, averaged over dimensions and summed over target and negative."""
    return (x_PD - y_PD).square().mean(-1).view(-1, 2).sum(-1)
