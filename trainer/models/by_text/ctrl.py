"""CTRL (Li et al. 2023, arXiv 2306.02841) over a SASRec: item embeddings start from text vectors, aligned or not.

Letters: B users, N items, F width of the text encoder, D of the backbone, M subspaces (and items of a batch), X any
axis.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.config.text_systems import CTRLAlignConfig
from trainer.data.collators.base import ItemSequences
from trainer.data.collators.item_texts import HistoryTexts
from trainer.data.encoder_texts import PaddedTexts
from trainer.models.by_id.sasrec import SASRec
from trainer.models.interface import Losses
from trainer.nn import losses
from trainer.nn.saved_buffers import SavedTable
from trainer.nn.text_encoder import TextVectors

_SMALLEST_SHARE = 1e-6  # of the largest variance; components with less count as empty


class TextItems(nn.Module):
    """Replaces an item table by fixed text vectors and a trained linear map."""

    def __init__(self, rows: int, text_dim: int, dim: int) -> None:
        super().__init__()
        self.text = SavedTable(rows, text_dim)
        self.adapter = nn.Linear(text_dim, dim, bias=False)  # no bias, so that padding stays zero

    def forward(self, item: Tensor) -> Tensor:
        """(..., D) vectors of items; padding is 0."""
        vectors: Tensor = self.adapter(self.text(item))
        return vectors


class AlignTerms(NamedTuple):
    """Unit vectors of each user's history in M subspaces: from the backbone, and from its sentence."""

    behaviour_BMD: Tensor
    text_BMD: Tensor


class CTRLAlign(nn.Module):
    """Trains the backbone and the projections of both sides; the encoder is frozen."""

    def __init__(self, config: CTRLAlignConfig, backbone: SASRec, reader: TextVectors) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        self.reader = reader.requires_grad_(False)
        dim = backbone.config.dim
        self.behaviour = nn.Sequential(nn.Linear(dim, dim), nn.Linear(dim, dim * config.subspaces))
        self.text = nn.Sequential(nn.Linear(reader.encoder.dim, dim), nn.Linear(dim, dim * config.subspaces))

    def forward(self, batch: HistoryTexts) -> AlignTerms:
        """Both views of each user's history."""
        behaviour_BMD = self._subspaces(self.behaviour, self.backbone.user_vectors(batch.sequence))
        return AlignTerms(behaviour_BMD, self._read(batch.texts))

    def loss(self, terms: AlignTerms) -> Losses:
        """Cross-entropy of each history's own sentence among those of the global batch, and vice versa."""
        total = fine_grained_contrast(terms.behaviour_BMD, terms.text_BMD, self.config.temperature).mean()
        return Losses(total, {"contrast": total.detach()})

    def user_vectors(self, batch: ItemSequences) -> Tensor:
        """(B, M D) the backbone's view of each history."""
        return self._subspaces(self.behaviour, self.backbone.user_vectors(batch)).flatten(1)

    def item_vectors(self, batch: PaddedTexts) -> Tensor:
        """(M, M D) text view of one-item histories; how well retrieval finds them shows how well the views agree."""
        return self._read(batch).flatten(1)

    def train(self, mode: bool = True) -> CTRLAlign:
        """Set the mode; the frozen encoder stays in evaluation mode."""
        super().train(mode)
        self.reader.train(False)
        return self

    def _read(self, texts: PaddedTexts) -> Tensor:
        with torch.no_grad():
            vector_BF = self.reader(texts)
        return self._subspaces(self.text, vector_BF)

    def _subspaces(self, projection: nn.Module, vector_BX: Tensor) -> Tensor:
        projected_BX = projection(vector_BX)
        # No -1, which is ambiguous for a rank without users.
        shape = (len(vector_BX), self.config.subspaces, self.backbone.config.dim)
        return F.normalize(projected_BX.view(shape), dim=-1)


def fine_grained_contrast(first_BMD: Tensor, second_BMD: Tensor, temperature: float) -> Tensor:
    """Symmetric in-batch contrast with maximum similarity over subspaces (Eq. 4-8 of CTRL), shape (B,).

    s(x, y) = Σ_m max_n ⟨x_m, y_n⟩; half the cross-entropy of x's own y plus half that of y's own x.
    """
    similarity_BBMM = torch.einsum("bmd,cnd->bcmn", first_BMD, second_BMD) / temperature
    forward_BB = similarity_BBMM.amax(3).sum(2)
    backward_BB = similarity_BBMM.amax(2).sum(2).T
    own_B = 1 + torch.arange(len(first_BMD), device=first_BMD.device)
    return 0.5 * (losses.full_softmax(forward_BB, own_B) + losses.full_softmax(backward_BB, own_B))


def principal_axes(vector_NF: Tensor, dim: int, *, whiten: bool) -> tuple[Tensor, Tensor]:
    """The centred vectors (N, F) and the map (F, dim) to their first principal components.

    Raw vectors of language models share one large direction; without centring all items would start equal.

    Args:
        whiten: divide each component by its standard deviation; components without variance stay 0.
    """
    # On the CPU, because Gaudi lacks float64.
    centred_NF = vector_NF.double().cpu() - vector_NF.double().cpu().mean(0)
    variance_F, axis_FF = torch.linalg.eigh(centred_NF.T @ centred_NF / len(centred_NF))
    axis_FD, variance_D = axis_FF.flip(1)[:, :dim], variance_F.flip(0)[:dim]
    largest_D = axis_FD.gather(0, axis_FD.abs().argmax(0, keepdim=True))[0]
    axis_FD = axis_FD * largest_D.sign()  # eigenvectors have an arbitrary sign
    if whiten:
        varies_D = variance_D > _SMALLEST_SHARE * variance_D[0]
        axis_FD = axis_FD * torch.where(varies_D, variance_D.clamp(min=1e-30).rsqrt(), 0.0)
    return centred_NF, axis_FD


@torch.no_grad()
def start_from_text(backbone: SASRec, vector_NF: Tensor, *, whiten: bool) -> None:
    """Initialise a SASRec's items with the principal components of their text vectors, at the usual initial scale.

    Works for an item table and for `TextItems`, which then give the same vectors.

    Args:
        vector_NF: text vectors of items 1 to N.
    """
    centred_NF, axis_FD = principal_axes(vector_NF, backbone.config.dim, whiten=whiten)
    # The standard deviation of the Xavier initialisation that the table has otherwise.
    xavier_std = (2.0 / (backbone.num_items + 1 + backbone.config.dim)) ** 0.5
    axis_FD = axis_FD * (xavier_std / (centred_NF @ axis_FD).std())
    if isinstance(backbone.items, TextItems):
        spread = centred_NF.std()
        backbone.items.text.value[1:] = (centred_NF / spread).to(backbone.items.text.value)
        backbone.items.adapter.weight.copy_((axis_FD * spread).T)
    else:
        backbone.items.weight[1:] = (centred_NF @ axis_FD).to(backbone.items.weight)
