"""Causal attention over sequences without padding in front, with dropout of its weights.

Letters: B rows, L positions, D width, H heads, d width of a head, N rows times heads, Q queries of a block, K keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from trainer.nn.dropout import HashDropout

_QUERIES = 64
"""Queries of a block. A block computes no scores of keys behind its last query, and stays in a CPU's cache."""


class CausalAttention(nn.Module):
    """Multi-head attention of every position to itself and those before it.

    Args:
        length: most positions of a sequence.
        address: see `HashDropout`.
    """

    def __init__(self, dim: int, heads: int, length: int, dropout: float, address: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)
        self.dropout = HashDropout(dropout, (heads, length), address)
        for layer in (self.query, self.key, self.value, self.out):
            nn.init.zeros_(layer.bias)

    def forward(self, query_BLD: Tensor, memory_BLD: Tensor, word_BL: Tensor | None) -> Tensor:
        """(B, L, D) attention of each position of `query_BLD` to those of `memory_BLD` up to itself."""
        dropout = self.dropout if self.dropout.active else None
        heads_NLd = self._projected(query_BLD, memory_BLD)
        mixed_NLd: Tensor = _Causal.apply(*heads_NLd, word_BL, dropout)  # type: ignore[no-untyped-call]
        return self._joined(mixed_NLd, query_BLD)

    def last(self, query_B1D: Tensor, memory_BLD: Tensor, word_B1: Tensor | None, last_B: Tensor) -> Tensor:
        """(B, 1, D) what `forward` gives at the positions `last_B`."""
        q_N1d, k_NLd, v_NLd = self._projected(query_B1D, memory_BLD)
        length = memory_BLD.shape[1]
        behind_BL = torch.arange(length, device=last_B.device) > last_B[:, None]
        behind_N1L = behind_BL.repeat_interleave(self.heads, 0)[:, None]
        score_N1L = q_N1d @ k_NLd.transpose(1, 2) * q_N1d.shape[-1] ** -0.5
        weight_N1L = score_N1L.masked_fill(behind_N1L, float("-inf")).softmax(-1)
        if self.dropout.active:
            weight_N1L = weight_N1L * self.dropout.weight_mask(word_B1, length, weight_N1L.dtype) * self.dropout.scale
        return self._joined(weight_N1L @ v_NLd, query_B1D)

    def _projected(self, query_BQD: Tensor, memory_BLD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of each head."""

        def split(x_BLD: Tensor) -> Tensor:
            rows, length, dim = x_BLD.shape
            split_BLHd = x_BLD.view(rows, length, self.heads, dim // self.heads)
            return split_BLHd.transpose(1, 2).reshape(rows * self.heads, length, dim // self.heads)

        return split(self.query(query_BQD)), split(self.key(memory_BLD)), split(self.value(memory_BLD))

    def _joined(self, mixed_NQd: Tensor, like_BQD: Tensor) -> Tensor:
        rows, length, dim = like_BQD.shape
        mixed_BHQd = mixed_NQd.view(rows, self.heads, length, dim // self.heads)
        attended_BQD: Tensor = self.out(mixed_BHQd.transpose(1, 2).reshape(rows, length, dim))
        return attended_BQD


class _Causal(torch.autograd.Function):
    """softmax(q k' / sqrt(d)) v over the keys up to each query, block by block of queries.

    Scales are factors of the products, which a matrix product applies for nothing.
    """

    @staticmethod
    def forward(
        ctx: Any, q_NLd: Tensor, k_NLd: Tensor, v_NLd: Tensor, word_BL: Tensor | None, dropout: HashDropout | None
    ) -> Tensor:
        ctx.scales = q_NLd.shape[-1] ** -0.5, dropout.scale if dropout else 1.0
        out_NLd = torch.empty_like(q_NLd)
        hidden_QQ = torch.full((_QUERIES, _QUERIES), float("-inf"), dtype=q_NLd.dtype, device=q_NLd.device).triu_(1)
        saved: list[Tensor] = []
        for block in _blocks(q_NLd.shape[1]):
            queries = block.stop - block.start
            score_NQK = _product(q_NLd[:, block], k_NLd[:, : block.stop].transpose(1, 2), ctx.scales[0])
            score_NQK[:, :, block] += hidden_QQ[:queries, :queries]
            weight_NQK = kept_NQK = score_NQK.softmax(-1)
            if dropout is not None:
                assert word_BL is not None
                kept_NQK = dropout.weight_mask(word_BL[:, block], block.stop, weight_NQK.dtype).mul_(weight_NQK)
            out_NLd[:, block] = _product(kept_NQK, v_NLd[:, : block.stop], ctx.scales[1])
            if any(ctx.needs_input_grad):
                saved += (weight_NQK, kept_NQK)
        ctx.save_for_backward(q_NLd, k_NLd, v_NLd, out_NLd, *saved)
        return out_NLd

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        (grad_NLd,) = grads
        q_NLd, k_NLd, v_NLd, out_NLd, *saved = ctx.saved_tensors
        score_scale, value_scale = ctx.scales
        q_grad_NLd, k_grad_NLd, v_grad_NLd = torch.empty_like(q_NLd), torch.zeros_like(k_NLd), torch.zeros_like(v_NLd)
        # With P the weights, M the mask and G = dO v': dS = P (M G - r), where r_i = Σ_j P_ij M_ij G_ij = ⟨dO_i, O_i⟩.
        along_NL1 = (grad_NLd * out_NLd).sum(-1, keepdim=True)
        for block, weight_NQK, kept_NQK in zip(_blocks(q_NLd.shape[1]), saved[::2], saved[1::2], strict=True):
            seen, grad_NQd = slice(0, block.stop), grad_NLd[:, block]
            v_grad_NLd[:, seen].baddbmm_(kept_NQK.transpose(1, 2), grad_NQd, alpha=value_scale)
            score_NQK = _product(grad_NQd, v_NLd[:, seen].transpose(1, 2), value_scale).mul_(kept_NQK)
            score_NQK.addcmul_(weight_NQK, along_NL1[:, block], value=-1.0)
            q_grad_NLd[:, block] = _product(score_NQK, k_NLd[:, seen], score_scale)
            k_grad_NLd[:, seen].baddbmm_(score_NQK.transpose(1, 2), q_NLd[:, block], alpha=score_scale)
        return q_grad_NLd, k_grad_NLd, v_grad_NLd, None, None


def _product(a_NXY: Tensor, b_NYZ: Tensor, scale: float) -> Tensor:
    """scale * a @ b."""
    return torch.baddbmm(a_NXY.new_empty(1, 1, 1), a_NXY, b_NYZ, beta=0, alpha=scale)


def _blocks(length: int) -> Iterator[slice]:
    for start in range(0, length, _QUERIES):
        yield slice(start, min(start + _QUERIES, length))
