"""Attention over a stream of segments: each query sees the keys of its own prompt and computes nothing else.

Registered with transformers under the name `SEGMENTS`; the decoder's layers hand their queries, keys and values here,
with the `Pass` that the frozen LLM gives to the decoder's forward.

On CUDA in bf16 a variable-length flash kernel computes all segments in one call (`varlen_kernel`); elsewhere, and for
padded rows, segments of similar size are computed at once with a mask.

Letters: N tokens of the stream, M keys (those of earlier passes first), G segments of a group, Q and K their padded
queries and keys, J keys of all segments, H heads, h key heads, d width of a head.
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

log = logging.getLogger(__name__)

SEGMENTS = "segments"

_PLAIN_LAYER = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
"""Parts of a decoder layer whose forward is known: x += self_attn(norm(x)); x += mlp(norm(x))."""

Memory = dict[int, tuple[Tensor, Tensor]]
"""Keys and values (M, h, d), by layer."""


class VarlenKernel(Protocol):
    """Attention over sequences of different lengths, end to end: query (N, H, d), key and value (J, h, d) -> (N, H, d).

    Causal, with the last query of a sequence aligned to its last key; `window` counts the keys that a query sees.
    """

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float | None, window: int | None
    ) -> Tensor: ...


@dataclass
class Pass:
    """One pass of a stream through the decoder."""

    stream: Stream
    readout_R: Tensor | None = None
    """Positions whose hidden states are wanted; None: only keys and values are."""
    memory: Sequence[Memory] = ()
    """What precedes this pass: the pass before, what a store holds."""
    remember: bool = False
    """Keep this pass's keys and values for the next one."""
    kept: Memory = field(default_factory=dict)
    _visible: dict[int | None, list[Tensor]] = field(default_factory=dict)

    def visible(self, window: int | None) -> list[Tensor]:
        """(G, 1, Q, K) for each group: the keys that a query sees, the latest `window` of its prompt."""
        if window not in self._visible:  # the same in all layers of a kind
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
    segments: Pass,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in each layer: query (1, H, N, d), key and value (1, h, N, d) -> (1, N, H, d)."""
    query_THd, key_Mhd, value_Mhd = (x[0].transpose(0, 1) for x in (query, key, value))
    # Not before it is needed: a number that differs between layers would be a graph for each.
    if segments.remember:
        segments.kept[_number(module)] = (key_Mhd, value_Mhd)
    if segments.memory:
        before_key, before_value = zip(*(memory[_number(module)] for memory in segments.memory), strict=True)
        key_Mhd, value_Mhd = torch.cat([*before_key, key_Mhd]), torch.cat([*before_value, value_Mhd])
    stream = segments.stream
    if stream.segments is not None and (kernel := varlen_kernel(query)):
        key_J = stream.segments.key_J
        mixed_THd = kernel(query_THd, key_Mhd[key_J], value_Mhd[key_J], stream.segments, scaling, sliding_window)
        return mixed_THd[None], None
    outputs = []
    for group, visible in zip(stream.groups, segments.visible(sliding_window), strict=True):
        mixed_GHQd = F.scaled_dot_product_attention(
            query_THd[group.query_GQ].transpose(1, 2),
            key_Mhd[group.key_GK].transpose(1, 2),
            value_Mhd[group.key_GK].transpose(1, 2),
            attn_mask=visible,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        outputs.append(mixed_GHQd.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)[stream.query_index_T][None], None


def varlen_kernel(query: Tensor) -> VarlenKernel | None:
    """The kernel that can take queries such as these (their device, dtype and width); None: there is none."""
    width = query.shape[-1]
    if query.device.type != "cuda" or query.dtype != torch.bfloat16 or width % 8 or width > 256:
        return None
    return _installed_kernel()


@cache
def _installed_kernel() -> VarlenKernel | None:
    """torch's own (2.11 and later), else that of flash-attn.

    Both align the last query with the last key (flash-attention since 2.1, whose kernels torch has).
    """
    kernel: VarlenKernel | None
    if (kernel := torch_varlen()) is not None:
        log.info("attention: varlen_attn of torch %s", torch.__version__)
    elif importlib.util.find_spec("flash_attn") is not None:
        log.info("attention: flash_attn_varlen_func of flash-attn")
        kernel = _flash_attn_varlen
    else:
        log.warning(
            "attention: neither torch %s nor flash-attn has a variable-length kernel, so that padded groups are "
            "computed, which is slower: install torch 2.11 or later, or flash-attn",
            torch.__version__,
        )
    return kernel


def torch_varlen() -> VarlenKernel | None:
    """`torch.nn.attention.varlen.varlen_attn`; None before torch 2.11, where it had neither scale nor window."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # before torch 2.10
        return None
    known = inspect.signature(varlen_attn).parameters
    if not {"scale", "window_size"} <= known.keys():
        return None
    # Before 2.12 it takes fewer key heads than heads without being told.
    more: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in known else {}

    def kernel(
        query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float | None, window: int | None
    ) -> Tensor:
        mixed_THd = varlen_attn(
            query, key, value, segments.cu_query_E, segments.cu_key_E, segments.max_query, segments.max_key,
            scale=scale, window_size=_before_and_after(window), **more,
        )  # fmt: skip
        assert isinstance(mixed_THd, Tensor), "nothing else was asked for"
        return mixed_THd

    return kernel


def _flash_attn_varlen(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float | None, window: int | None
) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    mixed_THd: Tensor = flash_attn_varlen_func(
        query, key, value, segments.cu_query_E, segments.cu_key_E, segments.max_query, segments.max_key,
        softmax_scale=scale, causal=True, window_size=_before_and_after(window),
    )  # fmt: skip
    return mixed_THd


def _before_and_after(window: int | None) -> tuple[int, int]:
    """Keys that a query sees besides its own, as flash-attention counts them; -1: all."""
    return (-1 if window is None else window - 1, 0)


def _number(layer: nn.Module) -> int:
    number: int = layer.layer_idx  # type: ignore[assignment]
    return number


def _visible(group: AttentionGroup, window: int | None) -> Tensor:
    column_K = torch.arange(group.key_GK.shape[1], device=group.key_GK.device)
    last_GQ1 = group.last_GQ[:, :, None]
    visible_GQK = (column_K >= group.first_GQ[:, :, None]) & (column_K <= last_GQ1)
    if window is not None:
        visible_GQK &= column_K > last_GQ1 - window
    return visible_GQK[:, None]


def finish_at_readouts(layer: Any) -> None:
    """Make the decoder's last layer return only the hidden states that are read, (1, P, D).

    All its keys and values are needed, but what follows attention is computed at the read-outs alone.
    """
    whole = layer.forward
    plain = {name for name, _ in layer.named_children()} == _PLAIN_LAYER and not hasattr(layer, "residual_multiplier")

    def forward(hidden_states: Tensor, *, segments: Pass, **kwargs: Any) -> Any:
        read_R = segments.stream.token_T[:0] if segments.readout_R is None else segments.readout_R
        if not plain:
            out = whole(hidden_states, segments=segments, **kwargs)
            # Before transformers 5 some layers return a tuple.
            return (out[0][:, read_R], *out[1:]) if isinstance(out, tuple) else out[:, read_R]
        mixed_1TD, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), segments=segments, **kwargs)
        hidden_1RD: Tensor = hidden_states[:, read_R] + mixed_1TD[:, read_R]
        fed_1RD: Tensor = layer.mlp(layer.post_attention_layernorm(hidden_1RD))
        return hidden_1RD + fed_1RD

    layer.forward = forward


AttentionInterface.register(SEGMENTS, attend)
