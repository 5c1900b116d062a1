"""Attention over a stream of segments: a query is scored against the keys of its own prompt only.

Registered with transformers under the name `SEGMENTS`; the decoder's layers pass their queries, keys and values here,
with the `DecoderPass` that the frozen LLM gives to the decoder's forward.

On CUDA in bf16 a variable-length flash kernel computes all segments in one call (`varlen_kernel`); elsewhere, and for
padded rows, segments of similar size are padded, batched and masked.

Letters: T tokens of the stream, M keys (those of earlier passes first), G segments of a group, Q and K their padded
queries and keys, J keys of all segments, R read-outs, H heads, h KV heads, d head width, D width of the LLM.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from trainer.data.prompts.packing import AttentionGroup, Segments, Stream
from trainer.device import FusedAttention, fused_attention, on_cuda

log = logging.getLogger(__name__)

SEGMENTS = "segments"

_PLAIN_LAYER = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
"""Children of a decoder layer whose forward is x += self_attn(norm(x)); x += mlp(norm(x))."""

KVCache = dict[int, tuple[Tensor, Tensor]]
"""KV cache of one pass: keys and values, (M, h, d) each, by layer index."""


class VarlenKernel(Protocol):
    """Attention over sequences joined end to end: query (T, H, d), key and value (J, h, d) -> (T, H, d).

    Causal, with the last query of a sequence aligned to its last key. `window` is the number of keys that a query sees,
    its own included; None: all.
    """

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float | None, window: int | None
    ) -> Tensor: ...


@dataclass
class DecoderPass:
    """One pass of a stream through the decoder."""

    stream: Stream
    readout_R: Tensor | None = None
    """Positions whose hidden states are returned; None: only the KV cache is needed."""
    memory: Sequence[KVCache] = ()
    """KV caches that precede this pass: that of the frozen pass, then the rows of the prefix cache."""
    remember: bool = False
    """Keep this pass's keys and values in `kept`, for the next pass."""
    kept: KVCache = field(default_factory=dict)
    fused: FusedAttention | None = field(default_factory=fused_attention)
    """The device's kernel for masked attention. Looked up here, outside of the layers, which may be compiled."""
    _visible: dict[int | None, list[Tensor]] = field(default_factory=dict)

    def visible(self, window: int | None) -> list[Tensor]:
        """(G, 1, Q, K) mask of each group, True where a query sees a key: the latest `window` of its prompt."""
        if window not in self._visible:  # all layers with the same window share their masks
            self._visible[window] = [_visible(group, window) for group in self.stream.groups]
        return self._visible[window]


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    segments: DecoderPass,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function of every layer: query (1, H, T, d), key and value (1, h, T, d) -> (1, T, H, d)."""
    query_THd, key_Mhd, value_Mhd = (x[0].transpose(0, 1) for x in (query, key, value))
    # The layer index is read only where needed: torch.compile takes it as a constant and would build a graph per layer.
    if segments.remember:
        segments.kept[_layer_index(module)] = (key_Mhd, value_Mhd)
    if segments.memory:
        before_key, before_value = zip(*(memory[_layer_index(module)] for memory in segments.memory), strict=True)
        key_Mhd, value_Mhd = torch.cat([*before_key, key_Mhd]), torch.cat([*before_value, value_Mhd])
    stream = segments.stream
    if stream.segments is not None and (kernel := varlen_kernel(query)):
        key_J = stream.segments.key_J
        mixed_THd = kernel(query_THd, key_Mhd[key_J], value_Mhd[key_J], stream.segments, scaling, sliding_window)
        return mixed_THd[None], None
    assert stream.query_index_T is not None, "packed for a variable-length kernel, which these queries do not fit"
    if query.device.type == "cpu":
        # The CPU's backward pass in bf16 takes up to five times as long as in fp32 where queries are few.
        query_THd, key_Mhd, value_Mhd = query_THd.float(), key_Mhd.float(), value_Mhd.float()
    queries = _gather(query_THd, [group.query_GQ for group in stream.groups])
    keys, values = (_gather(x_Mhd, [group.key_GK for group in stream.groups]) for x_Mhd in (key_Mhd, value_Mhd))
    outputs = []
    for query_GQHd, key_GKhd, value_GKhd, visible in zip(
        queries, keys, values, segments.visible(sliding_window), strict=True
    ):
        query_GHQd, key_GhKd, value_GhKd = (x.transpose(1, 2) for x in (query_GQHd, key_GKhd, value_GKhd))
        mixed_GHQd = masked_attention(query_GHQd, key_GhKd, value_GhKd, visible, scaling, segments.fused)
        outputs.append(mixed_GHQd.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)[stream.query_index_T][None].to(query.dtype), None


def masked_attention(
    query_GHQd: Tensor,
    key_GhKd: Tensor,
    value_GhKd: Tensor,
    visible_G1QK: Tensor,
    scale: float | None,
    fused: FusedAttention | None = None,
) -> Tensor:
    """Attention of padded queries to the keys that they see, (G, H, Q, d).

    On an accelerator KV heads are repeated for the query heads that share them: of the kernels that take a mask, those
    that do not hold all (G, H, Q, K) weights for the backward pass accept only as many KV heads as query heads.

    Args:
        fused: a kernel of the accelerator to use instead of torch's.
    """
    repeats = query_GHQd.shape[1] // key_GhKd.shape[1]
    if query_GHQd.device.type != "cpu" or fused is not None:
        key_GhKd, value_GhKd = _repeated(key_GhKd, repeats), _repeated(value_GhKd, repeats)
    if fused is not None:
        mixed_GHQd: Tensor = fused(query_GHQd, key_GhKd, value_GhKd, visible_G1QK, scale)
        return mixed_GHQd
    return F.scaled_dot_product_attention(
        query_GHQd,
        key_GhKd,
        value_GhKd,
        attn_mask=visible_G1QK,
        scale=scale,
        enable_gqa=query_GHQd.shape[1] != key_GhKd.shape[1],
    )


def _repeated(x_GhKd: Tensor, times: int) -> Tensor:
    """(G, h * times, K, d), each head `times` times in a row."""
    return x_GhKd[:, :, None].expand(-1, -1, times, -1, -1).flatten(1, 2) if times > 1 else x_GhKd


def varlen_kernel(query: Tensor) -> VarlenKernel | None:
    """The kernel for queries of this device, dtype and head width; None where there is none."""
    return _installed_kernel() if _fits_varlen(query.device.type, query.dtype, query.shape[-1]) else None


def reads_groups(dtype: torch.dtype, width: int) -> bool:
    """Whether attention reads a stream's groups, on this process's device with heads of this dtype and width.

    Otherwise a variable-length kernel reads `Stream.segments` alone, and groups need not be built.
    """
    return not (on_cuda() and _fits_varlen("cuda", dtype, width) and _installed_kernel() is not None)


def _fits_varlen(device: str, dtype: torch.dtype, width: int) -> bool:
    return device == "cuda" and dtype == torch.bfloat16 and width % 8 == 0 and width <= 256


@cache
def _installed_kernel() -> VarlenKernel | None:
    """The kernel of torch (2.11 and later), else of flash-attn, else None; cached, so that the choice is logged once.

    Both align the last query with the last key, as flash-attention, whose kernels torch includes, does since 2.1.
    """
    kernel: VarlenKernel | None
    if (kernel := torch_varlen()) is not None:
        log.info("attention: using varlen_attn of torch %s", torch.__version__)
    elif importlib.util.find_spec("flash_attn") is not None:
        log.info("attention: using flash_attn_varlen_func of flash-attn")
        kernel = _flash_attn_varlen
    else:
        log.warning(
            "attention: no variable-length kernel in torch %s and flash-attn is not installed; falling back to padded "
            "groups, which is slower: install torch 2.11 or later, or flash-attn",
            torch.__version__,
        )
    return kernel


def torch_varlen() -> VarlenKernel | None:
    """`torch.nn.attention.varlen.varlen_attn`; None before torch 2.11, where it has neither scale nor window."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # before torch 2.10
        return None
    known = inspect.signature(varlen_attn).parameters
    if not {"scale", "window_size"} <= known.keys():
        return None
    # Before 2.12 it has no such flag and accepts fewer KV heads than query heads as is.
    more: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in known else {}

    def kernel(
        query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float | None, window: int | None
    ) -> Tensor:
        mixed_THd = varlen_attn(
            query, key, value, segments.cu_query_E, segments.cu_key_E, segments.max_query, segments.max_key,
            scale=scale, window_size=_window_size(window), **more,
        )  # fmt: skip
        assert isinstance(mixed_THd, Tensor), "returns a tuple only with return_aux"
        return mixed_THd

    return kernel


def _flash_attn_varlen(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float | None, window: int | None
) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    mixed_THd: Tensor = flash_attn_varlen_func(
        query, key, value, segments.cu_query_E, segments.cu_key_E, segments.max_query, segments.max_key,
        softmax_scale=scale, causal=True, window_size=_window_size(window),
        deterministic=torch.are_deterministic_algorithms_enabled(),  # torch's own kernel reads this by itself
    )  # fmt: skip
    return mixed_THd


def _window_size(window: int | None) -> tuple[int, int]:
    """Keys that a query sees before and after its own, as flash-attention counts them; -1: all."""
    return (-1 if window is None else window - 1, 0)


def _layer_index(attention: nn.Module) -> int:
    index: int = attention.layer_idx  # type: ignore[assignment]
    return index


def _gather(x: Tensor, indices: Sequence[Tensor]) -> list[Tensor]:
    """`x[index]` for each index, read at once: the backward pass of each read would fill and add a tensor like `x`."""
    read = x[torch.cat([index.flatten() for index in indices])]
    parts = torch.split(read, [index.numel() for index in indices])
    return [part.view(*index.shape, *x.shape[1:]) for part, index in zip(parts, indices, strict=True)]


def _visible(group: AttentionGroup, window: int | None) -> Tensor:
    column_K = torch.arange(group.key_GK.shape[1], device=group.key_GK.device)
    last_GQ1 = group.last_GQ[:, :, None]
    visible_GQK = (column_K >= group.first_GQ[:, :, None]) & (column_K <= last_GQ1)
    if window is not None:
        visible_GQK &= column_K > last_GQ1 - window
    return visible_GQK[:, None]


def finish_at_readouts(layer: Any) -> None:
    """Make the decoder's last layer return hidden states at the read-outs only, (1, R, D).

    Its keys and values are needed at every position, but everything after attention only at the read-outs.
    """
    full_forward = layer.forward
    # Granite scales its residual branches, which the short form below does not.
    plain = {name for name, _ in layer.named_children()} == _PLAIN_LAYER and not hasattr(layer, "residual_multiplier")

    def forward(hidden_states: Tensor, *args: Any, segments: DecoderPass, **kwargs: Any) -> Any:
        # A pass that only fills the KV cache reads out nothing.
        read_R = segments.stream.token_T[:0] if segments.readout_R is None else segments.readout_R
        if not plain:
            out = full_forward(hidden_states, *args, segments=segments, **kwargs)
            # Before transformers 5 some layers return a tuple.
            return (out[0][:, read_R], *out[1:]) if isinstance(out, tuple) else out[:, read_R]
        mixed_1TD, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), segments=segments, **kwargs)
        hidden_1RD: Tensor = hidden_states[:, read_R] + mixed_1TD[:, read_R]
        fed: Any = layer.mlp(layer.post_attention_layernorm(hidden_1RD))
        # Before transformers 5 a mixture of experts also returns its routing.
        fed_1RD: Tensor = fed[0] if isinstance(fed, tuple) else fed
        return hidden_1RD + fed_1RD

    layer.forward = forward


AttentionInterface.register(SEGMENTS, attend)
