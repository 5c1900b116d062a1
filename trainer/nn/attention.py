"""Attention over a stream of segments: each query sees the keys of its own prompt and computes nothing else.

Registered with transformers under the name `SEGMENTS`; the decoder's layers hand their queries, keys and values here,
with the `Pass` that the frozen LLM gives to the decoder's forward.

Letters: N tokens of the stream, M keys (those of earlier passes first), G segments of a group, Q and K their padded
queries and keys, H heads, h key heads, d width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from trainer.data.packing import AttentionGroup, Stream

SEGMENTS = "segments"

_PLAIN_LAYER = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
"""Parts of a decoder layer whose forward is known: x += self_attn(norm(x)); x += mlp(norm(x))."""

Memory = dict[int, tuple[Tensor, Tensor]]
"""Keys and values (M, h, d), by layer."""


@dataclass
class Pass:
    """One pass of a stream through the decoder."""

    stream: Stream
    readout_P: Tensor | None = None
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
    query_NHd, key_Mhd, value_Mhd = (x[0].transpose(0, 1) for x in (query, key, value))
    # Not before it is needed: a number that differs between layers would be a graph for each.
    if segments.remember:
        segments.kept[_number(module)] = (key_Mhd, value_Mhd)
    if segments.memory:
        before_key, before_value = zip(*(memory[_number(module)] for memory in segments.memory), strict=True)
        key_Mhd, value_Mhd = torch.cat([*before_key, key_Mhd]), torch.cat([*before_value, value_Mhd])
    outputs = []
    for group, visible in zip(segments.stream.groups, segments.visible(sliding_window), strict=True):
        mixed_GHQd = F.scaled_dot_product_attention(
            query_NHd[group.query_GQ].transpose(1, 2),
            key_Mhd[group.key_GK].transpose(1, 2),
            value_Mhd[group.key_GK].transpose(1, 2),
            attn_mask=visible,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        outputs.append(mixed_GHQd.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)[segments.stream.place_N][None], None


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
        read_P = segments.stream.token_N[:0] if segments.readout_P is None else segments.readout_P
        if not plain:
            out = whole(hidden_states, segments=segments, **kwargs)
            # Before transformers 5 some layers return a tuple.
            return (out[0][:, read_P], *out[1:]) if isinstance(out, tuple) else out[:, read_P]
        mixed_1ND, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), segments=segments, **kwargs)
        hidden_1PD: Tensor = hidden_states[:, read_P] + mixed_1ND[:, read_P]
        fed_1PD: Tensor = layer.mlp(layer.post_attention_layernorm(hidden_1PD))
        return hidden_1PD + fed_1PD

    layer.forward = forward


AttentionInterface.register(SEGMENTS, attend)
