"""The small trained parts around the frozen LLM (paper §2.1, §3; sizes of the official code)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def item_projector(dim: int, llm_dim: int) -> nn.Sequential:
    """f_I: a row of the teacher's item table (M, dim) to an input vector of the LLM (M, llm_dim)."""
    return _xavier(
        nn.Sequential(nn.Linear(dim, llm_dim), nn.LayerNorm(llm_dim), nn.LeakyReLU(), nn.Linear(llm_dim, llm_dim))
    )


def user_projector(dim: int, llm_dim: int) -> nn.Sequential:
    """f_U: the teacher's user vector (B, dim) to an input vector of the LLM (B, llm_dim)."""
    return item_projector(dim, llm_dim)


def encoded_item_projector(dim: int, llm_dim: int) -> nn.Sequential:
    """A-LLMRec's f_I: a stage-1 encoding (M, dim) to an input vector of the LLM (M, llm_dim)."""
    return _xavier(
        nn.Sequential(nn.Linear(dim, llm_dim), nn.LayerNorm(llm_dim), nn.GELU(), nn.Linear(llm_dim, llm_dim))
    )


def shared_projector(dim: int, llm_dim: int) -> nn.Sequential:
    """CoLLM's one MLP for item rows and user vectors (M, dim) alike (official code, with its initialisation)."""
    return nn.Sequential(nn.Linear(dim, 10 * dim), nn.ReLU(), nn.Linear(10 * dim, llm_dim))


def readout_head(llm_dim: int, hidden_dim: int, projected_dim: int) -> nn.Sequential:
    """f_user and f_item: a hidden state (M, llm_dim) to the space of scores (M, projected_dim)."""
    return _xavier(
        nn.Sequential(
            nn.Linear(llm_dim, hidden_dim),
            nn.LayerNorm(hidden_dim),
            nn.LeakyReLU(),
            nn.Linear(hidden_dim, projected_dim),
        )
    )


def teacher_head(dim: int, projected_dim: int) -> nn.Sequential:
    """f_CF-user: the teacher's user vector (B, dim) to the space of scores (B, projected_dim)."""
    return _xavier(
        nn.Sequential(
            nn.Linear(dim, projected_dim),
            nn.LayerNorm(projected_dim),
            nn.GELU(),
            nn.Linear(projected_dim, projected_dim),
        )
    )


class LearnedToken(nn.Module):
    """[UserOut] or [ItemOut]: one input vector of the LLM.

    A module of its own, because ZeRO-3 gathers parameters when the module that owns them is called.

    Args:
        token_table: (V, llm_dim) embeddings of the LLM; the vector starts at a normal draw with their mean and std.
    """

    def __init__(self, token_table: Tensor) -> None:
        super().__init__()
        mean, std = token_table.float().mean(), token_table.float().std()
        self.vector = nn.Parameter(torch.randn(token_table.shape[1], device="cpu") * std.cpu() + mean.cpu())

    def forward(self, rows: int) -> Tensor:
        """The vector, `rows` times: (rows, llm_dim). Copies, because ZeRO-3 takes the parameter back on return."""
        return self.vector.repeat(rows, 1)


def _xavier(layers: nn.Sequential) -> nn.Sequential:
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_normal_(layer.weight)
    return layers
