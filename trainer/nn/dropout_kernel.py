"""The hashed dropout of adapters as one Triton kernel: reads the input, writes the output, and stores no mask.

The same bits as `hashed_dropout` of `dropout.py`, whose torch form takes about 30 kernels. Imported on CUDA only, where
torch's wheels bring triton.

Letters: T tokens, D features.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS, _COLUMNS = 4, 1024
"""Elements per program: 32 per thread of four warps, enough loads in flight to reach the memory's bandwidth."""


@triton.jit  # type: ignore[untyped-decorator]
def _mix(word: tl.tensor) -> tl.tensor:
    """lowbias32, as `_mix` of `dropout.py`; unsigned, so that shifts fill with zeros and products wrap."""
    word = word ^ (word >> 16)
    word = word * 0x7FEB352D
    word = word ^ (word >> 15)
    word = word * 0x846CA68B
    return word ^ (word >> 16)


# Not specialized: their values change with the step and the layer, and would compile the kernel again.
@triton.jit(do_not_specialize=["tokens", "salt", "threshold"])  # type: ignore[untyped-decorator]
def _kernel(
    x: tl.tensor, word: tl.tensor, out: tl.tensor, tokens: tl.tensor, width: tl.tensor, salt: tl.tensor,
    threshold: tl.tensor, kept_share: tl.tensor,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    """One block of ROWS tokens and COLUMNS features."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < tokens)[:, None] & (column < width)[None, :]
    token = tl.load(word + row, mask=row < tokens, other=0).to(tl.uint32, bitcast=True)
    feature = _mix((column + salt).to(tl.uint32, bitcast=True))
    kept = _mix(token[:, None] ^ feature[None, :]).to(tl.int32, bitcast=True) >= threshold
    # 64 bits: T x D may exceed 2^31.
    at = row[:, None].to(tl.int64) * width + column[None, :]
    value = tl.load(x + at, mask=inside, other=0.0)
    # A product, not a choice: torch's form keeps the signs of zeros and NaN, too. div_rn rounds as IEEE 754 does.
    tl.store(out + at, tl.math.div_rn(value * kept.to(tl.float32), kept_share), mask=inside)


def dropped(x_TD: Tensor, word_T: Tensor, salt: int, threshold: int, kept_share: float) -> Tensor:
    """(T, D) elements of `x` whose hash reaches the threshold, divided by the share kept; zeros elsewhere.

    Args:
        x_TD: fp32, contiguous.
        word_T: int32 hashes of the tokens, contiguous.
        salt: added to the index of a feature before it is hashed.
        threshold: signed 32-bit integer.
    """
    tokens, width = x_TD.shape
    out_TD = torch.empty_like(x_TD)
    if out_TD.numel():
        grid = (triton.cdiv(tokens, _ROWS), triton.cdiv(width, _COLUMNS))
        _kernel[grid](x_TD, word_T, out_TD, tokens, width, salt, threshold, kept_share, ROWS=_ROWS, COLUMNS=_COLUMNS)
    return out_TD
