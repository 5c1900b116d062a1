"""Causal attention over rows of different lengths, with dropout of its weights.

Letters: S slots (positions of all buckets end to end), X some of them, B rows of a bucket, L its positions, D width,
H heads, d width of a head, N rows times heads, Q queries of a block, K keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trainer.nn.dropout import HashDropout

Shapes = Sequence[tuple[int, int]]
"""Rows and positions of each bucket."""

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

    def forward(self, query_SD: Tensor, memory_SD: Tensor, word_S: Tensor | None, shapes: Shapes) -> Tensor:
        """(S, D) attention of each slot to those of its row up to itself.

        Args:
            query_SD: what queries are computed from.
            memory_SD: what keys and values are computed from.
            word_S: see `HashDropout`.
        """
        q_SD, k_SD, v_SD = self.query(query_SD), self.key(memory_SD), self.value(memory_SD)
        dropout = self.dropout if self.dropout.active else None
        mixed_SD: Tensor = _Causal.apply(q_SD, k_SD, v_SD, word_S, dropout, shapes, self.heads)  # type: ignore[no-untyped-call]
        attended_SD: Tensor = self.out(mixed_SD)
        return attended_SD

    def last(
        self, query_XD: Tensor, memory_SD: Tensor, word_X: Tensor | None, shapes: Shapes, last_X: Tensor
    ) -> Tensor:
        """(X, D) what `forward` gives at one position of each of the X rows of all buckets, `last_X` within its row."""
        q_XD, k_SD, v_SD = self.query(query_XD), self.key(memory_SD), self.value(memory_SD)
        mixed, start = [], 0
        for (rows, length), k_BLD, v_BLD in zip(shapes, split(k_SD, shapes), split(v_SD, shapes), strict=True):
            here = slice(start, start := start + rows)
            q_N1d, k_NLd, v_NLd = (_heads(x, self.heads) for x in (q_XD[here, None], k_BLD, v_BLD))
            behind_BL = torch.arange(length, device=last_X.device) > last_X[here, None]
            score_N1L = q_N1d @ k_NLd.transpose(1, 2) * q_N1d.shape[-1] ** -0.5
            score_N1L = score_N1L.masked_fill(behind_BL.repeat_interleave(self.heads, 0)[:, None], float("-inf"))
            weight_N1L = score_N1L.softmax(-1)
            if self.dropout.active:
                assert word_X is not None
                kept_N1L = self.dropout.weight_mask(word_X[here, None], length, weight_N1L.dtype)
                weight_N1L = weight_N1L * kept_N1L.mul_(self.dropout.scale)
            mixed.append((weight_N1L @ v_NLd).view(rows, v_BLD.shape[2]))
        attended_XD: Tensor = self.out(torch.cat(mixed))
        return attended_XD


def split(x_SX: Tensor, shapes: Shapes) -> Iterator[Tensor]:
    """`x` (S, ...) as one tensor (B, L, ...) for each bucket."""
    for part, shape in zip(torch.split(x_SX, [rows * length for rows, length in shapes]), shapes, strict=True):
        yield part.view(*shape, *x_SX.shape[1:])


class _Causal(torch.autograd.Function):
    """softmax(q k' / sqrt(d)) v over the keys up to each query, by bucket and block of queries.

    Scales are factors of matrix products, which apply them for nothing.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q_SD: Tensor,
        k_SD: Tensor,
        v_SD: Tensor,
        word_S: Tensor | None,
        dropout: HashDropout | None,
        shapes: Shapes,
        heads: int,
    ) -> Tensor:
        ctx.shapes, ctx.heads = shapes, heads
        ctx.scales = (q_SD.shape[1] // heads) ** -0.5, dropout.scale if dropout else 1.0
        behind_QQ = torch.full((_QUERIES, _QUERIES), float("-inf"), dtype=q_SD.dtype, device=q_SD.device).triu_(1)
        mixed_SD = torch.empty_like(q_SD)
        saved: list[Tensor] = []
        words = [None] * len(shapes) if word_S is None else split(word_S, shapes)
        for *parts_BLD, mixed_BLD, word_BL in zip(
            *(split(x, shapes) for x in (q_SD, k_SD, v_SD, mixed_SD)), words, strict=True
        ):
            q_NLd, k_NLd, v_NLd = (_heads(x, heads) for x in parts_BLD)
            for block in _blocks(q_NLd.shape[1]):
                queries = block.stop - block.start
                score_NQK = _product(q_NLd[:, block], k_NLd[:, : block.stop].transpose(1, 2), ctx.scales[0])
                score_NQK[:, :, block] += behind_QQ[:queries, :queries]
                weight_NQK = kept_NQK = score_NQK.softmax(-1)
                if dropout is not None:
                    assert word_BL is not None
                    kept_NQK = dropout.weight_mask(word_BL[:, block], block.stop, weight_NQK.dtype).mul_(weight_NQK)
                out = _part(mixed_BLD, block, heads)
                out.copy_(_product(kept_NQK, v_NLd[:, : block.stop], ctx.scales[1]).view_as(out))
                if any(ctx.needs_input_grad):
                    saved += (weight_NQK, kept_NQK)
        ctx.save_for_backward(q_SD, k_SD, v_SD, mixed_SD, *saved)
        return mixed_SD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs_SD, saved = ctx.saved_tensors[:4], list(ctx.saved_tensors[4:])
        found_SD = [torch.empty_like(x) for x in inputs_SD[:3]]
        parts = zip(*(split(x, ctx.shapes) for x in (*inputs_SD, grads[0].contiguous(), *found_SD)), strict=True)
        for parts_BLD in reversed(list(parts)):
            _gradients(parts_BLD[:5], parts_BLD[5:], saved, ctx.scales, ctx.heads)
        return *found_SD, None, None, None, None


def _gradients(
    given_BLD: Sequence[Tensor],
    found_BLD: Sequence[Tensor],
    saved: list[Tensor],
    scales: tuple[float, float],
    heads: int,
) -> None:
    """Compute gradients of a bucket.

    Args:
        given_BLD: its queries, keys, values, what `_Causal` returned, and the gradient of that.
        found_BLD: receive the gradients of queries, keys and values.
        saved: weights before and after dropout of each block; those of this bucket are taken off the end.
    """
    q_NLd, k_NLd, v_NLd, mixed_NLd, grad_NLd = (_heads(x, heads) for x in given_BLD)
    q_grad_BLD, k_grad_BLD, v_grad_BLD = found_BLD
    score_scale, value_scale = scales
    length = q_NLd.shape[1]
    # With P the weights, M the mask and G = dO v': dS = P (M G - r), where r_i = Σ_j P_ij M_ij G_ij = ⟨dO_i, O_i⟩.
    along_NL1 = (grad_NLd * mixed_NLd).sum(-1, keepdim=True)
    for block in reversed(list(_blocks(length))):
        kept_NQK, weight_NQK = saved.pop(), saved.pop()
        seen, grad_NQd = slice(0, block.stop), grad_NLd[:, block]
        v_grad_NKd = _product(kept_NQK.transpose(1, 2), grad_NQd, value_scale)
        score_NQK = _product(grad_NQd, v_NLd[:, seen].transpose(1, 2), value_scale).mul_(kept_NQK)
        score_NQK.addcmul_(weight_NQK, along_NL1[:, block], value=-1.0)
        k_grad_NKd = _product(score_NQK.transpose(1, 2), q_NLd[:, block], score_scale)
        out = _part(q_grad_BLD, block, heads)
        out.copy_(_product(score_NQK, k_NLd[:, seen], score_scale).view_as(out))
        for out_BLD, grad_NKd in ((k_grad_BLD, k_grad_NKd), (v_grad_BLD, v_grad_NKd)):
            out = _part(out_BLD, seen, heads)
            # The last block comes first and reaches all keys; the others add to what it has written.
            (out.copy_ if block.stop == length else out.add_)(grad_NKd.view_as(out))


def _heads(x_BLD: Tensor, heads: int) -> Tensor:
    """(B * H, L, d); a view if there is one head."""
    rows, length, dim = x_BLD.shape
    return _part(x_BLD, slice(None), heads).reshape(rows * heads, length, dim // heads)


def _part(x_BLD: Tensor, positions: slice, heads: int) -> Tensor:
    """(B, H, Q, d) view of these positions."""
    rows, length, dim = x_BLD.shape
    return x_BLD.view(rows, length, heads, dim // heads)[:, positions].transpose(1, 2)


def _product(a_NXY: Tensor, b_NYZ: Tensor, scale: float) -> Tensor:
    """scale * a @ b."""
    return torch.baddbmm(a_NXY.new_empty(1, 1, 1), a_NXY, b_NYZ, beta=0, alpha=scale)


def _blocks(length: int) -> Iterator[slice]:
    for start in range(0, length, _QUERIES):
        yield slice(start, min(start + _QUERIES, length))
