"""Dropout whose masks do not depend on the number of ranks.

Letters: T tokens of the stream, R read-outs, S slots, D features, G segments of a group, Q and K their padded queries
and keys. In `HashDropout`: X positions of any rows, B rows, H heads, Q and K queries and keys.
"""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.data.collators.base import BatchRows
from trainer.data.prompts.packing import PackedPrompts, Stream

log = logging.getLogger(__name__)


class RowDropout(nn.Module):
    """Dropout that draws the mask of the whole global batch and applies the part of its own rows.

    The engine seeds every rank alike before each step, so a user gets the same mask at any number of ranks.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor, rows: BatchRows) -> Tensor:
        """`x` (rows.count, ...) with elements dropped and the rest scaled by 1 / (1 - p) in training."""
        if not self.training or self.p == 0.0:
            return x
        draw = torch.rand((rows.total, *x.shape[1:]), device=x.device)[rows.start : rows.start + rows.count]
        # In place and in the type of `x`: a CPU multiplies by booleans nine times as slowly.
        return x * draw.ge_(self.p).div_(1.0 - self.p).to(x.dtype)


_CHUNK = 2**17
"""Elements whose masks a CPU computes at once."""


class HashDropout(nn.Module):
    """Dropout of item sequences: an element's mask is a hash of (step, module, user, position, feature).

    A rank computes the masks of its own rows alone, and they depend neither on how the global batch is split nor on
    padding. Hashing also takes a CPU a quarter of the time of drawing uniform numbers.

    Args:
        features: (D,) of the tensors it drops elements of, or (heads, most keys) for weights of attention.
        address: a number that no other module of the model has.
    """

    features: Tensor

    def __init__(self, p: float, features: tuple[int, ...], address: int) -> None:
        super().__init__()
        self.p = p
        self.scale = 1.0 / (1.0 - p)
        index = torch.arange(math.prod(features), dtype=torch.int32).view(features)
        # Computed rather than trained or saved: no part of checkpoints.
        self.register_buffer("features", _mix(_mix(torch.tensor(address, dtype=torch.int32)) + index), persistent=False)

    @property
    def active(self) -> bool:
        """Whether anything is dropped."""
        return self.training and self.p > 0.0

    def forward(self, x_XD: Tensor, word_X: Tensor | None) -> Tensor:
        """`x` with elements dropped and the rest scaled by 1 / (1 - p) in training.

        Args:
            word_X: from `position_words`; needed in training alone.
        """
        return x_XD * self._mask(x_XD, word_X).mul_(self.scale) if self.active else x_XD

    def added(self, x_XD: Tensor, residual_XD: Tensor, word_X: Tensor | None) -> Tensor:
        """`residual + self(x)` in one pass."""
        if not self.active:
            return residual_XD + x_XD
        return torch.addcmul(residual_XD, x_XD, self._mask(x_XD, word_X), value=self.scale)

    def relu(self, x_XD: Tensor, word_X: Tensor | None) -> Tensor:
        """`relu(self(x))`; saves only what it returns for the backward pass."""
        if not self.active:
            return F.relu(x_XD)
        out_XD: Tensor = _MaskedReLU.apply(x_XD, self._mask(x_XD, word_X), self.scale)  # type: ignore[no-untyped-call]
        return out_XD

    def weight_mask(self, word_BQ: Tensor, keys: int, dtype: torch.dtype) -> Tensor:
        """(B * H, Q, K) of 1 where a weight of attention to the first `keys` keys is kept, and of 0 elsewhere."""
        return self._kept(word_BQ[:, None, :, None] ^ self.features[:, None, :keys]).to(dtype).flatten(0, 1)

    def _mask(self, x_XD: Tensor, word_X: Tensor | None) -> Tensor:
        """1 where an element is kept, and 0 elsewhere."""
        assert word_X is not None, "dropout needs the words of `position_words`"
        mask_XD = torch.empty_like(x_XD)
        rows = _chunk_rows(x_XD)
        for part_X, part_XD in zip(torch.split(word_X, rows), torch.split(mask_XD, rows), strict=True):
            part_XD.copy_(self._kept(part_X[:, None] ^ self.features))
        return mask_XD

    def _kept(self, word: Tensor) -> Tensor:
        # Both parts of a word are hashes already, so that half a hash mixes them. Its low bits would be poor; the
        # comparison reads the high ones. In place, and in floats instead of booleans, for speed.
        word.mul_(_signed(0x7FEB352D))
        word.bitwise_xor_(word >> 15).mul_(_signed(0x846CA68B))
        # Signed words are uniform over [-2^31, 2^31).
        return word.float().ge_(float(int(self.p * 2**32) - 2**31))


class _MaskedReLU(torch.autograd.Function):
    """relu(x) times a mask of 0 and 1, times `scale`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, scale: float) -> Tensor:
        out = F.relu(x).mul_(mask).mul_(scale)
        ctx.save_for_backward(out)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (out,) = ctx.saved_tensors
        # Positive exactly where x is and the mask is not 0.
        return torch.ops.aten.threshold_backward(grads[0], out, 0.0).mul_(ctx.scale), None, None


def position_words(row: Tensor, place: Tensor) -> Tensor:
    """Words that identify positions of this step's global batch to `HashDropout`, int32, of the arguments' shape.

    Draws one number from the CPU's generator, which the engine seeds alike on every rank before each forward pass.

    Args:
        row: rows of the global batch.
        place: positions within the row, counted so that padding does not matter.
    """
    # A tensor, because a device that compiles graphs would compile a Python number into them.
    step = torch.randint(-(2**31), 2**31, (), dtype=torch.int32).to(row.device, non_blocking=True)
    return _mix(_mix(row.int() ^ step) + place.int())


class TokenHashes:
    """Hashes that identify the tokens of a forward pass, shared by all `TokenDropout` modules of one LLM."""

    def __init__(self) -> None:
        self._word_T = torch.zeros(0, dtype=torch.int32)
        self._word_R = self._word_T

    def set(self, seed: int, prompts: PackedPrompts) -> None:
        """Hash the tokens of the next forward pass; call before each one in training.

        A token's hash covers its prompt up to and including the token itself. It is therefore the same on every rank,
        whatever the prompt is packed with, and where prompts share a prefix.

        Args:
            seed: seed of this optimizer step, the same on every rank.
        """
        assert prompts.frozen is None, "a decoder with adapters runs all tokens in one pass"
        stream = prompts.trained
        # A slot counts by what is injected there; negative, to stay apart from token ids.
        content_T = stream.token_T.index_put((prompts.slot_S,), -2 - prompts.slot_item_S).int()
        # The position makes the order of tokens count: the prefix hash below is a plain (wrapping) sum.
        content_T = _mix(_mix(content_T ^ _signed(seed)) + stream.position_T.int())
        self._word_T = _mix(_prefix_sums(content_T, stream))
        self._word_R = self._word_T[prompts.readout_R]
        assert len(self._word_R) < len(self._word_T), "`words` tells the stream from the read-outs by their counts"

    def words(self, count: int) -> Tensor:
        """(count,) hashes of all tokens of the stream, or of those at the read-outs, all that the last layer keeps."""
        found = self._word_T if count == len(self._word_T) else self._word_R
        assert len(found) == count, "call `set` before each forward pass"
        return found


class TokenDropout(nn.Module):
    """Dropout inside the LLM: an element's mask is a hash of (step, layer, token, feature), see `TokenHashes`.

    The mask depends neither on the ranks that share a batch nor on how prompts are packed. The backward pass computes
    it again: stored, it would take a byte per element of the input of each adapter.

    Args:
        layer: index of this instance, unique within one LLM.
    """

    def __init__(self, p: float, layer: int, address: TokenHashes) -> None:
        super().__init__()
        self.p = p
        self._salt = layer * 0x10001
        self._address = address

    def forward(self, x_1TD: Tensor) -> Tensor:
        """`x` with elements dropped and the rest scaled by 1 / (1 - p) in training."""
        if not self.training or self.p == 0.0:
            return x_1TD
        word_T = self._address.words(x_1TD.shape[1])
        # Views, whose gradients are views, too; that of an index would fill and copy a tensor.
        out_TD: Tensor = _HashedDropout.apply(x_1TD.squeeze(0), word_T, self._salt, self.p)  # type: ignore[no-untyped-call]
        return out_TD.unsqueeze(0)


class _HashedDropout(torch.autograd.Function):
    """`hashed_dropout`; its gradient is the same function, of the gradient of what it returned."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, word_T: Tensor, salt: int, p: float) -> Tensor:
        ctx.save_for_backward(word_T)
        ctx.salt, ctx.p = salt, p
        return hashed_dropout(x_TD, word_T, salt, p)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (word_T,) = ctx.saved_tensors
        return hashed_dropout(grads[0], word_T, ctx.salt, ctx.p), None, None, None


def hashed_dropout(x_TD: Tensor, word_T: Tensor, salt: int, p: float) -> Tensor:
    """(T, D) elements of `x`, dropped or divided by 1 - p by a hash of their token's word and their feature.

    One kernel on CUDA (`dropout_kernel.py`), with the same bits.

    Args:
        word_T: int32 words of the tokens.
        salt: tells apart the adapters of one token.
    """
    threshold = int(p * 2**32) - 2**31  # signed words are uniform over [-2^31, 2^31)
    # A compiler fuses torch's passes on its own.
    usable = x_TD.device.type == "cuda" and x_TD.dtype == torch.float32 and not torch.compiler.is_compiling()
    if usable and (kernel := _fused_kernel(x_TD.device)):
        return kernel(x_TD.contiguous(), word_T, salt, threshold, 1.0 - p)
    return _unfused(x_TD, word_T, salt, threshold, 1.0 - p)


def _unfused(x_TD: Tensor, word_T: Tensor, salt: int, threshold: int, kept_share: float) -> Tensor:
    feature_D = _mix(torch.arange(salt, salt + x_TD.shape[1], dtype=torch.int32, device=x_TD.device))
    # A tensor: by a Python number CUDA would multiply with the reciprocal, which is one rounding more.
    share_1 = x_TD.new_full((1,), kept_share)
    out_TD = torch.empty_like(x_TD)
    rows = _chunk_rows(x_TD)
    for x, word_X, out in zip(*(torch.split(tensor, rows) for tensor in (x_TD, word_T, out_TD)), strict=True):
        kept = _mix_in_place(word_X[:, None] ^ feature_D) >= threshold
        # In the type of `x`: a CPU multiplies by booleans nine times as slowly.
        torch.mul(x, kept.to(x.dtype), out=out).div_(share_1)
    return out_TD


@cache
def _fused_kernel(device: torch.device) -> Callable[[Tensor, Tensor, int, int, float], Tensor] | None:
    """The Triton kernel; None where it cannot be imported or compiled, or where its bits are not those of torch.

    Cached, so that a device is tried, and a reason logged, once.
    """
    slower = "the dropout of adapters runs in about 30 kernels of torch instead of one"
    if importlib.util.find_spec("triton") is None:
        log.warning("triton is not installed: %s; install the triton that belongs to your torch", slower)
        return None
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(33, 1100, generator=generator)
    word_T = torch.randint(-(2**31), 2**31, (33,), dtype=torch.int32, generator=generator)
    arguments = (x_TD.to(device), word_T.to(device), 0x10001, -(2**30), 0.75)
    try:
        from trainer.nn.dropout_kernel import dropped

        equal = torch.equal(dropped(*arguments), _unfused(*arguments))
    except Exception as error:  # noqa: BLE001 - compiling fails in many ways (no C compiler, an old driver), none fatal
        log.warning("triton cannot compile here (%s): %s", str(error).strip().split("\n")[0] or type(error), slower)
        return None
    if not equal:
        log.warning("the Triton kernel's dropout differs from torch's on %s: %s", device, slower)
        return None
    return dropped


def _chunk_rows(x_XD: Tensor) -> int:
    """Rows whose masks are computed at once: all, but on a CPU few enough to stay in its cache, because a hash passes
    over its words many times."""
    return max(1, _CHUNK // x_XD.shape[1] if x_XD.device.type == "cpu" else len(x_XD))


def _prefix_sums(content_T: Tensor, stream: Stream) -> Tensor:
    """(T,) for each token, the wrapping sum of `content_T` over its prompt up to and including itself."""
    if stream.segments is not None:
        cu_query_E, cu_key_E = stream.segments.cu_query_E.long(), stream.segments.cu_key_E.long()
        total_J = F.pad(content_T[stream.segments.key_J].cumsum(0, dtype=torch.int32), (1, 0))
        token_T = torch.arange(len(content_T), device=content_T.device)
        segment_T = torch.searchsorted(cu_query_E, token_T, right=True) - 1
        # A segment's last query is aligned with its last key: each key from there on is one query later.
        end_T = cu_key_E[segment_T + 1] - (cu_query_E[segment_T + 1] - token_T) + 1
        return total_J[end_T] - total_J[cu_key_E[segment_T]]
    assert stream.query_index_T is not None
    [group] = stream.groups  # padded rows, where query and key positions are those of the row
    total_GK = content_T[group.key_GK].cumsum(1, dtype=torch.int32)
    before_GQ = total_GK.gather(1, (group.first_GQ - 1).clamp(min=0)) * (group.first_GQ > 0)
    return (total_GK.gather(1, group.last_GQ) - before_GQ).flatten()[stream.query_index_T]


def _mix(word: Tensor) -> Tensor:
    """Bijective hash of 32-bit words (lowbias32, Wellons 2018), in int32 because that works on every device."""
    return _mix_in_place(word.clone())


def _mix_in_place(word: Tensor) -> Tensor:
    word.bitwise_xor_((word >> 16).bitwise_and_(0xFFFF))  # masked, because >> copies the sign bit
    word.mul_(_signed(0x7FEB352D))
    word.bitwise_xor_((word >> 15).bitwise_and_(0x1FFFF))
    word.mul_(_signed(0x846CA68B))
    return word.bitwise_xor_((word >> 16).bitwise_and_(0xFFFF))


def _signed(word: int) -> int:
    """The low 32 bits as a signed integer."""
    return (word + 2**31) % 2**32 - 2**31
