"""Packs many prompts into one stream of tokens: each token is computed once, and nothing is padded.

A prompt is a trunk with branches; the tokens before its first slot depend on no trained weight. So a batch becomes two
passes through the decoder:

    frozen   the tokens before the first slots, each shared prefix once; run without gradient
    trained  all other tokens; they attend to the KV cache of the frozen pass

Tokens attend to each other only within *segments*: a segment is a stretch of one stream that continues a context (the
keys of the tokens before it in its prompt). Segments of similar size form a group, whose attention is computed in one
call; a variable-length kernel takes all segments in one call and needs no groups.

The tokens before the first slots may also be in a prefix cache (`prefix_cache_index.py`); they are then not run at all.

Letters: T tokens of a stream, R read-outs, S slots, of which K receive learned tokens, I item vectors and V user
vectors; G segments of a group, Q and K their padded queries and keys, J keys of all segments, E segments of a stream
plus one, M rows of a prefix cache.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.data.collators.base import ON_HOST
from trainer.data.prompts.prompt import READOUT_SLOT, USER_SLOT, Prompt
from trainer.data.reading.counter_rng import IntArray

_MAX_QUERIES = 128
"""Most queries per segment of a group. Longer segments are split, so that their first queries are not computed against
the later keys, only to be masked: at 314 queries attention is 2.3 times as fast on a CPU."""
_EMPTY = np.zeros(0, np.int64)
_WORTH_SHARING = 8  # tokens; a shorter common prefix is cheaper to recompute than to keep as a segment of its own


@dataclass(frozen=True)
class AttentionGroup:
    """Segments whose attention is one call. Query (g, q) attends to key columns `first_GQ` to `last_GQ`, inclusive."""

    query_GQ: Tensor
    """Indices into the stream; padding repeats index 0."""
    key_GK: Tensor
    """Indices into the keys of the frozen pass, followed by those of the prefix cache and those of this pass."""
    first_GQ: Tensor
    last_GQ: Tensor


@dataclass(frozen=True)
class Segments:
    """All segments of a stream, end to end, in the format of variable-length attention kernels.

    Queries are those of the stream in order; a segment's last query is aligned with its last key.
    """

    cu_query_E: Tensor
    """Where the queries of each segment start, then the number of all queries (`cu_seqlens` of the kernels); int32."""
    cu_key_E: Tensor
    """Where the keys of each segment start in `key_J`, then the length of `key_J`; int32."""
    key_J: Tensor
    """Key indices, counted as in `AttentionGroup.key_GK`: for each segment those of its context, then its own."""
    max_query: int
    """Most queries per segment."""
    max_key: int
    """Most keys per segment."""


@dataclass(frozen=True)
class Stream:
    """The tokens of one pass through the decoder."""

    token_T: Tensor
    position_T: Tensor
    """Position within the prompt."""
    groups: tuple[AttentionGroup, ...]
    """Empty if the stream was packed for a variable-length kernel, which reads `segments` alone."""
    query_index_T: Tensor | None
    """Index of each token's query among the padded queries of all groups, end to end; None without groups."""
    segments: Segments | None
    """None for padded rows (`row_packing.py`)."""


@dataclass(frozen=True)
class PackedPrompts:
    """Prompts ready for the decoder. Slots and read-outs are indices into the trained stream.

    They are listed prompt by prompt: those of the trunk first, then those of each branch.
    """

    frozen: Stream | None
    """None if no pass runs without gradient."""
    trained: Stream
    slot_S: Tensor
    slot_item_S: Tensor
    """What is injected into each slot: the vector of an item (its id), `USER_SLOT` or `READOUT_SLOT`."""
    slot_prompt_S: Tensor = field(metadata=ON_HOST)
    """Index of each slot's prompt."""
    learned_K: Tensor
    """Indices of the slots that receive learned tokens. Not a mask, whose entries would have to be counted first: host
    and device would have to synchronise."""
    shown_I: Tensor
    """Indices of the slots that receive item vectors."""
    user_V: Tensor
    """Indices of the slots that receive user vectors."""
    user_prompt_V: Tensor | None
    """Index of each such slot's prompt; None if every prompt of a user has one, in order."""
    readout_R: Tensor
    readout_prompt_R: Tensor = field(metadata=ON_HOST)
    """Index of each read-out's prompt."""
    cached_M: IntArray
    """Rows of the prefix cache that follow the keys of the frozen pass; on the host, which reads them from the file."""
    useful_tokens: int
    """Tokens of the prompts if each were run alone."""
    run_tokens: int
    """Tokens that are run: fewer where prefixes are shared, more where rows are padded."""


@dataclass
class StreamWriter:
    """A stream under construction."""

    shift: int = 0
    """Number of keys before those of this stream."""
    tokens: list[IntArray] = field(default_factory=list)
    positions: list[IntArray] = field(default_factory=list)
    segments: list[tuple[int, int, IntArray]] = field(default_factory=list)
    """Start and length of each segment, and its context: the indices of the keys before its own."""
    length: int = 0

    def add(self, token_T: IntArray, context: IntArray) -> IntArray:
        """Append a segment that continues `context`; return the context of a segment that continues this one."""
        start, size = self.length, len(token_T)
        self.tokens.append(token_T)
        self.positions.append(len(context) + np.arange(size))
        self.length += size
        seen = np.concatenate([context, self.shift + start + np.arange(size)])
        if size:
            self.segments.append((start, size, context))
        return seen

    def finish(self, *, grouped: bool = True) -> Stream:
        """The stream as tensors; a stream without tokens gets one.

        Args:
            grouped: build the groups; False where a variable-length kernel computes all attention.
        """
        if not self.length:
            self.add(np.zeros(1, np.int64), _EMPTY)  # an empty rank runs the decoder too, as all ranks do
        groups: tuple[AttentionGroup, ...] = ()
        query_index_T: Tensor | None = None
        if grouped:
            groups, query_index_T = group_segments(self.segments, self.shift, self.length)
        segments = _flat_segments(self.segments, self.shift)
        return Stream(joined(self.tokens), joined(self.positions), groups, query_index_T, segments)


def pack(
    prompts: Sequence[Prompt],
    *,
    frozen_prefix: bool = True,
    cached: Mapping[bytes, IntArray] | None = None,
    grouped: bool = True,
) -> PackedPrompts:
    """Pack prompts into a frozen and a trained stream.

    Args:
        frozen_prefix: run the tokens before the first slots in a pass without gradient. False where weights inside the
            decoder are trained (LoRA): one stream then holds all tokens.
        cached: prefix-cache rows of a prefix, keyed by the bytes of its tokens; requires `frozen_prefix`.
        grouped: see `StreamWriter.finish`.
    """
    assert frozen_prefix or not cached, "keys of a trained decoder cannot be cached"
    frozen = StreamWriter()
    trained = StreamWriter() if frozen_prefix else frozen
    prefixes = [prefix_tokens(prompt) for prompt in prompts]
    rows = [(cached or {}).get(token_T.tobytes(), _EMPTY) for token_T in prefixes]
    uncached = [_EMPTY if len(row_T) else token_T for token_T, row_T in zip(prefixes, rows, strict=True)]
    contexts = write_prefixes(frozen, uncached)
    frozen_stream = frozen.finish(grouped=grouped) if frozen_prefix else None
    cached_M = np.unique(np.concatenate([_EMPTY, *rows]))
    if frozen_prefix:
        # Keys of the trained pass come after those of the frozen pass and the cached rows, which np.unique has sorted.
        trained.shift = frozen.length + len(cached_M)
        contexts = [
            frozen.length + np.searchsorted(cached_M, row_T) if len(row_T) else context
            for row_T, context in zip(rows, contexts, strict=True)
        ]
    slots: list[tuple[IntArray, IntArray, int]] = []
    readouts: list[tuple[IntArray, int]] = []
    for index, (prompt, before) in enumerate(zip(prompts, contexts, strict=True)):
        at, size = trained.length, len(before)
        context = trained.add(prompt.token_T[size:], before)
        slots.append((at + prompt.slot_S - size, prompt.item_S, index))
        readouts.append((at + prompt.readout_R - size, index))
        for branch in prompt.branches:
            at = trained.length
            trained.add(branch.token_T, context[: branch.after])
            slots.append((at + branch.slot_S, branch.item_S, index))
            readouts.append((at + branch.readout_R, index))
    stream = trained.finish(grouped=grouped)
    item_S = np.concatenate([_EMPTY, *(item for _, item, _ in slots)])
    return PackedPrompts(
        frozen=frozen_stream,
        trained=stream,
        slot_S=joined(slot for slot, _, _ in slots),
        slot_item_S=torch.from_numpy(item_S),
        slot_prompt_S=joined(np.full(len(item), index) for _, item, index in slots),
        learned_K=indices(item_S == READOUT_SLOT),
        shown_I=indices(item_S > 0),
        user_V=indices(item_S == USER_SLOT),
        user_prompt_V=None,
        readout_R=joined(position for position, _ in readouts),
        readout_prompt_R=joined(np.full(len(position), index) for position, index in readouts),
        cached_M=cached_M,
        useful_tokens=sum(prompt.tokens for prompt in prompts),
        run_tokens=(frozen.length if frozen_prefix else 0) + trained.length,
    )


def prefix_tokens(prompt: Prompt) -> IntArray:
    """Tokens of the trunk before its first slot or read-out."""
    return prompt.token_T[: min([*prompt.slot_S[:1], *prompt.readout_R[:1]], default=len(prompt.token_T))]


def write_prefixes(stream: StreamWriter, prefixes: Sequence[IntArray]) -> list[IntArray]:
    """Write prefixes, shared ones once; return the context after each.

    A radix tree: prefixes that agree in their next `_WORTH_SHARING` tokens share a segment, as long as they agree.
    """
    context: list[IntArray] = [_EMPTY] * len(prefixes)
    stack = [(list(range(len(prefixes))), 0, _EMPTY)]
    while stack:
        members, depth, above = stack.pop()
        alike: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for member in members:
            ahead = tuple(prefixes[member][depth : depth + _WORTH_SHARING].tolist())
            if ahead:
                alike[ahead].append(member)
            else:
                context[member] = above
        for together in alike.values():
            common = _common_length([prefixes[member][depth:] for member in together])
            below = stream.add(prefixes[together[0]][depth : depth + common], above)
            stack.append((together, depth + common, below))
    return context


def _common_length(arrays: Sequence[IntArray]) -> int:
    """Length of the longest prefix that all arrays share."""
    shortest = min(len(array) for array in arrays)
    differs_T = np.zeros(shortest, bool)
    for array in arrays[1:]:
        differs_T |= array[:shortest] != arrays[0][:shortest]
    return int(differs_T.argmax()) if differs_T.any() else shortest


def _flat_segments(segments: Sequence[tuple[int, int, IntArray]], shift: int) -> Segments:
    """The segments of `StreamWriter.segments`, end to end."""
    keys = [np.concatenate([context, shift + start + np.arange(size)]) for start, size, context in segments]
    sizes = np.array([[size, len(key_K)] for (_, size, _), key_K in zip(segments, keys, strict=True)])
    cu_query_E, cu_key_E = (np.append(0, lengths.cumsum()).astype(np.int32) for lengths in sizes.T)
    max_query, max_key = sizes.max(0).tolist()
    return Segments(torch.from_numpy(cu_query_E), torch.from_numpy(cu_key_E), joined(keys), max_query, max_key)


def group_segments(
    segments: Sequence[tuple[int, int, IntArray]], shift: int, length: int
) -> tuple[tuple[AttentionGroup, ...], Tensor]:
    """Group segments whose numbers of queries and keys round up to the same powers of two.

    Args:
        segments: see `StreamWriter.segments`.
        shift: number of keys before those of the stream.
        length: tokens of the stream.

    Returns:
        The groups, and the stream's `query_index_T`.
    """
    alike: dict[tuple[int, int], list[tuple[int, int, IntArray]]] = defaultdict(list)
    for start, whole, before in segments:
        own = shift + start + np.arange(whole)
        for cut in range(0, whole, _MAX_QUERIES):
            size, context = min(_MAX_QUERIES, whole - cut), np.concatenate([before, own[:cut]])
            alike[_round_up(size), _round_up(len(context) + size)].append((start + cut, size, context))
    groups = []
    query_index_T = np.zeros(length, np.int64)
    first_query = 0
    for members in alike.values():
        queries = max(size for _, size, _ in members)
        keys = max(len(context) + size for _, size, context in members)
        query_GQ = np.zeros((len(members), queries), np.int64)
        key_GK = np.zeros((len(members), keys), np.int64)
        last_GQ = np.zeros((len(members), queries), np.int64)  # padding attends to key 0: a softmax over none is NaN
        for row, (start, size, context) in enumerate(members):
            own = start + np.arange(size)
            query_GQ[row, :size] = own
            key_GK[row, : len(context) + size] = np.concatenate([context, shift + own])
            last_GQ[row, :size] = len(context) + np.arange(size)
            query_index_T[own] = first_query + row * queries + np.arange(size)
        first_query += len(members) * queries
        arrays = (query_GQ, key_GK, np.zeros_like(last_GQ), last_GQ)
        groups.append(AttentionGroup(*(torch.from_numpy(array) for array in arrays)))
    return tuple(groups), torch.from_numpy(query_index_T)


def _round_up(size: int) -> int:
    """The next power of two, at least 16."""
    return 1 << max(size - 1, 15).bit_length()


def indices(where_S: NDArray[np.bool_]) -> Tensor:
    """Indices of the true entries."""
    return torch.from_numpy(np.flatnonzero(where_S))


def joined(parts: Iterable[IntArray]) -> Tensor:
    """Concatenate integer arrays; without any, an empty int64 tensor."""
    return torch.from_numpy(np.concatenate([_EMPTY, *parts]))
