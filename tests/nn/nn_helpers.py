"""A plain PyTorch variable-length attention kernel, for devices without one."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.data.prompts.packing import Segments


def plain_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scale: float | None,
    window: int | None,
    *,
    align_last: bool = True,
) -> Tensor:
    """Implement `trainer.nn.llm.attention.VarlenKernel`, segment by segment.

    Args:
        align_last: Align the last query of a sequence with its last key. False is the other convention of kernels:
            the first query is aligned with the first key.
    """
    mixed, heads, key_heads = [], query.shape[1], key.shape[1]
    starts = list(zip(segments.cu_query_E.tolist(), segments.cu_key_E.tolist(), strict=True))
    for (query_start, key_start), (query_stop, key_stop) in pairwise(starts):
        queries, keys = query_stop - query_start, key_stop - key_start
        assert 0 < queries <= min(keys, segments.max_query)
        assert keys <= segments.max_key
        last_Q1 = torch.arange(queries)[:, None] + (keys - queries if align_last else 0)
        column_K = torch.arange(keys)
        seen_QK = (column_K <= last_Q1) & (column_K > last_Q1 - (window or keys))
        mixed.append(
            F.scaled_dot_product_attention(
                query[query_start:query_stop].transpose(0, 1),
                key[key_start:key_stop].transpose(0, 1),
                value[key_start:key_stop].transpose(0, 1),
                attn_mask=seen_QK,
                scale=scale,
                enable_gqa=heads != key_heads,
            ).transpose(0, 1)
        )
    assert starts[0] == (0, 0)
    assert starts[-1] == (len(query), len(key))
    return torch.cat(mixed)
