"""The small trained modules around the frozen LLM (paper §2.1, §3; sizes of the official code)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


def item_projector(dim: int, llm_dim: int) -> nn.Sequential:
    """f_I: rows of the teacher's item table (M, dim) -> injected embeddings (M, llm_dim)."""
    return _xavier(
        nn.Sequential(nn.Linear(dim, llm_dim), nn.LayerNorm(llm_dim), nn.LeakyReLU(), nn.Linear(llm_dim, llm_dim))
    )


def user_projector(dim: int, llm_dim: int) -> nn.Sequential:
    """f_U: user vectors of the teacher (B, dim) -> injected embeddings (B, llm_dim)."""
    return item_projector(dim, llm_dim)


def encoded_item_projector(dim: int, llm_dim: int) -> nn.Sequential:
    """A-LLMRec's f_I: stage-1 item encodings (M, dim) -> injected embeddings (M, llm_dim)."""
    return _xavier(
        nn.Sequential(nn.Linear(dim, llm_dim), nn.LayerNorm(llm_dim), nn.GELU(), nn.Linear(llm_dim, llm_dim))
    )


def shared_projector(dim: int, llm_dim: int) -> nn.Sequential:
    """CoLLM's one MLP for item rows and user vectors, (M, dim) -> (M, llm_dim), initialised as in the official code."""
    return nn.Sequential(nn.Linear(dim, 10 * dim), nn.ReLU(), nn.Linear(10 * dim, llm_dim))


def readout_head(llm_dim: int, hidden_dim: int, projected_dim: int) -> nn.Sequential:
    """f_user and f_item: hidden states (M, llm_dim) -> score space (M, projected_dim)."""
    return _xavier(
        nn.Sequential(
            nn.Linear(llm_dim, hidden_dim),
            nn.LayerNorm(hidden_dim),
            nn.LeakyReLU(),
            nn.Linear(hidden_dim, projected_dim),
        )
    )


def teacher_head(dim: int, projected_dim: int) -> nn.Sequential:
    """f_CF-user: user vectors of the teacher (B, dim) -> score space (B, projected_dim)."""
    return _xavier(
        nn.Sequential(
            nn.Linear(dim, projected_dim),
            nn.LayerNorm(projected_dim),
            nn.GELU(),
            nn.Linear(projected_dim, projected_dim),
        )
    )


class TokenScale(NamedTuple):
    """Width, mean and standard deviation of an LLM's token embeddings; a pass over the table, so computed once."""

    dim: int
    mean: Tensor
    std: Tensor

    @staticmethod
    def of(token_table: Tensor) -> TokenScale:
        """Statistics of a (V, llm_dim) table, on the CPU."""
        table_VD = token_table.float()
        return TokenScale(table_VD.shape[1], table_VD.mean().cpu(), table_VD.std().cpu())


class LearnedToken(nn.Module):
    """[UserOut] or [ItemOut]: one learned input embedding of the LLM.

    A module of its own, because ZeRO-3 gathers parameters when the module that owns them is called.

    Args:
        scale: of the LLM's token embeddings; the vector is drawn from a normal distribution with their mean and
            standard deviation.
    """

    def __init__(self, scale: TokenScale) -> None:
        super().__init__()
        # Drawn on the CPU, so that it is the same on every device.
        self.vector = nn.Parameter(torch.randn(scale.dim, device="cpu") * scale.std + scale.mean)

    def forward(self, rows: int) -> Tensor:
        """(rows, llm_dim) copies of the vector; not views, because ZeRO-3 releases the parameter on return."""
        return self.vector.repeat(rows, 1)


def _xavier(layers: nn.Sequential) -> nn.Sequential:
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_normal_(layer.weight)
    return layers
