"""Many prompts in one stream of tokens, each token computed once and nothing padded.

A prompt is a trunk and branches that leave it; what precedes its first slot depends on nothing that is trained. So a
batch becomes two passes through the decoder:

    frozen   what precedes the first slots, beginnings that several prompts share only once; run without gradient
    trained  everything else; it sees the keys and values of the frozen pass

Tokens see each other only within *segments*: a segment is a stretch of one stream that continues a context (the keys
of what precedes it in its prompt). Segments of similar size form a group, which attention computes at once; a kernel
that takes sequences of different lengths computes all segments at once and needs no groups.

What precedes the first slots may also have been computed before the run (`title_store.py`); it is then not run at all.

Letters: N tokens of a stream, P read-outs, S slots, G segments of a group, Q and K their padded queries and keys,
J keys of all segments, E segments of a stream and one, M rows of a store.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.data.prompts.prompt import READOUT_SLOT, USER_SLOT, Prompt
from trainer.data.reading.counter_rng import IntArray

_LONGEST = 128
"""Queries of a segment in a group. A longer one is cut: its first part then does not look past itself, which at 314
queries makes attention 2.3 times as fast on a CPU."""
_NOTHING = np.zeros(0, np.int64)
_WORTH_SHARING = 8  # tokens; a shorter common beginning is cheaper computed twice than kept apart


@dataclass(frozen=True)
class AttentionGroup:
    """Segments that attention computes at once. Query (g, q) sees the keys of columns `first_GQ` to `last_GQ`."""

    query_GQ: Tensor
    """Positions in the stream; padding repeats position 0."""
    key_GK: Tensor
    """Positions in the keys of the frozen pass, followed by those from a store and those of this pass."""
    first_GQ: Tensor
    last_GQ: Tensor


@dataclass(frozen=True)
class Segments:
    """All segments of a stream, end to end, as variable-length attention kernels take them.

    Queries are those of the stream in its order, and a segment's last query sees the last of its keys.
    """

    cu_query_E: Tensor
    """Where the queries of each segment start, then their number (`cu_seqlens` of the kernels); int32."""
    cu_key_E: Tensor
    """The same of their keys, among `key_J`."""
    key_J: Tensor
    """Positions in the keys that `AttentionGroup.key_GK` counts: of each segment its context's and its own."""
    max_query: int
    max_key: int
    """Of one segment."""


@dataclass(frozen=True)
class Stream:
    """The tokens of one pass through the decoder."""

    token_T: Tensor
    position_T: Tensor
    """Position within the prompt."""
    groups: tuple[AttentionGroup, ...]
    query_index_T: Tensor
    """Where each token's query stands among those of all groups, laid end to end."""
    segments: Segments | None
    """None: padded rows."""


@dataclass(frozen=True)
class PackedPrompts:
    """Prompts ready for the decoder. Slots and read-outs are positions in the trained stream.

    Slots and read-outs come prompt after prompt, in each the trunk's first, then its branches'.
    """

    frozen: Stream | None
    """None: there is no pass without gradient."""
    trained: Stream
    slot_S: Tensor
    slot_item_S: Tensor
    """Whose vector is put in: an item, `USER_SLOT` or `READOUT_SLOT`."""
    slot_prompt_S: Tensor
    learned_K: Tensor
    """Which slots receive learned tokens. Places, for a mask would make a device wait for the host to count it."""
    shown_I: Tensor
    """Which receive items' vectors."""
    user_V: Tensor
    """Which receive users' vectors."""
    readout_R: Tensor
    readout_prompt_R: Tensor
    cached_M: IntArray
    """Rows of the store that are put behind the keys of the frozen pass: numbers for the host, which reads the file."""
    useful_tokens: int
    """Tokens of the prompts, had each been run alone."""
    run_tokens: int
    """Tokens that are run: fewer where beginnings are shared, more where rows are padded."""


@dataclass
class StreamWriter:
    """A stream being written."""

    shift: int = 0
    """Keys that precede those of this stream."""
    tokens: list[IntArray] = field(default_factory=list)
    positions: list[IntArray] = field(default_factory=list)
    segments: list[tuple[int, int, IntArray]] = field(default_factory=list)
    """Start, length, and the keys seen before its own."""
    length: int = 0

    def add(self, token_T: IntArray, context: IntArray) -> IntArray:
        """Append a segment that continues `context`; returns the context of what continues it."""
        start, size = self.length, len(token_T)
        self.tokens.append(token_T)
        self.positions.append(len(context) + np.arange(size))
        self.length += size
        seen = np.concatenate([context, self.shift + start + np.arange(size)])
        if size:
            self.segments.append((start, size, context))
        return seen

    def finish(self) -> Stream:
        if not self.length:
            self.add(np.zeros(1, np.int64), _NOTHING)  # a rank without work takes part all the same
        groups, query_index_T = group_segments(self.segments, self.shift, self.length)
        segments = _end_to_end(self.segments, self.shift)
        return Stream(joined(self.tokens), joined(self.positions), groups, query_index_T, segments)


def pack(
    prompts: Sequence[Prompt], *, frozen_prefix: bool = True, cached: Mapping[bytes, IntArray] | None = None
) -> PackedPrompts:
    """One stream for all prompts.

    Args:
        frozen_prefix: run what precedes the first slots in a pass without gradient. False where weights inside the
            decoder are trained (LoRA).
        stored: rows of a store with the keys of a beginning, by the bytes of its tokens; needs `frozen_prefix`.
    """
    assert frozen_prefix or not cached, "keys of a trained decoder cannot be stored"
    frozen = StreamWriter()
    trained = StreamWriter() if frozen_prefix else frozen
    begun = [prefix_tokens(prompt) for prompt in prompts]
    rows = [(cached or {}).get(token_T.tobytes(), _NOTHING) for token_T in begun]
    run = [_NOTHING if len(row_T) else token_T for token_T, row_T in zip(begun, rows, strict=True)]
    contexts = write_prefixes(frozen, run)
    pass_without_gradient = frozen.finish() if frozen_prefix else None
    cached_M = np.unique(np.concatenate([_NOTHING, *rows]))
    if frozen_prefix:
        trained.shift = frozen.length + len(cached_M)
        contexts = [
            frozen.length + np.searchsorted(cached_M, row_T) if len(row_T) else context
            for row_T, context in zip(rows, contexts, strict=True)
        ]
    slots: list[tuple[IntArray, IntArray, int]] = []
    readouts: list[tuple[IntArray, int]] = []
    for number, (prompt, before) in enumerate(zip(prompts, contexts, strict=True)):
        at, size = trained.length, len(before)
        context = trained.add(prompt.token_T[size:], before)
        slots.append((at + prompt.slot_S - size, prompt.item_S, number))
        readouts.append((at + prompt.readout_R - size, number))
        for branch in prompt.branches:
            at = trained.length
            trained.add(branch.token_T, context[: branch.after])
            slots.append((at + branch.slot_S, branch.item_S, number))
            readouts.append((at + branch.readout_R, number))
    stream = trained.finish()
    item_S = np.concatenate([_NOTHING, *(item for _, item, _ in slots)])
    return PackedPrompts(
        frozen=pass_without_gradient,
        trained=stream,
        slot_S=joined(slot for slot, _, _ in slots),
        slot_item_S=torch.from_numpy(item_S),
        slot_prompt_S=joined(np.full(len(item), number) for _, item, number in slots),
        learned_K=places(item_S == READOUT_SLOT),
        shown_I=places(item_S > 0),
        user_V=places(item_S == USER_SLOT),
        readout_R=joined(position for position, _ in readouts),
        readout_prompt_R=joined(np.full(len(position), number) for position, number in readouts),
        cached_M=cached_M,
        useful_tokens=sum(prompt.tokens for prompt in prompts),
        run_tokens=(frozen.length if frozen_prefix else 0) + trained.length,
    )


def prefix_tokens(prompt: Prompt) -> IntArray:
    """The tokens of the trunk that come before everything that is put in or read."""
    return prompt.token_T[: min([*prompt.slot_S[:1], *prompt.readout_R[:1]], default=len(prompt.token_T))]


def write_prefixes(stream: StreamWriter, prefixes: Sequence[IntArray]) -> list[IntArray]:
    """Write the beginnings, shared ones once; returns the context after each.

    A radix tree: beginnings that agree in their next tokens get one segment for all that they agree in.
    """
    context: list[IntArray] = [_NOTHING] * len(prefixes)
    stack = [(list(range(len(prefixes))), 0, _NOTHING)]
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
    shortest = min(len(array) for array in arrays)
    differs_T = np.zeros(shortest, bool)
    for array in arrays[1:]:
        differs_T |= array[:shortest] != arrays[0][:shortest]
    return int(differs_T.argmax()) if differs_T.any() else shortest


def _end_to_end(segments: Sequence[tuple[int, int, IntArray]], shift: int) -> Segments:
    keys = [np.concatenate([context, shift + start + np.arange(size)]) for start, size, context in segments]
    sizes = np.array([[size, len(key_K)] for (_, size, _), key_K in zip(segments, keys, strict=True)])
    cu_query_E, cu_key_E = (np.append(0, lengths.cumsum()).astype(np.int32) for lengths in sizes.T)
    max_query, max_key = sizes.max(0).tolist()
    return Segments(torch.from_numpy(cu_query_E), torch.from_numpy(cu_key_E), joined(keys), max_query, max_key)


def group_segments(
    segments: Sequence[tuple[int, int, IntArray]], shift: int, length: int
) -> tuple[tuple[AttentionGroup, ...], Tensor]:
    """Groups of segments whose sizes round up to the same powers of two."""
    alike: dict[tuple[int, int], list[tuple[int, int, IntArray]]] = defaultdict(list)
    for start, whole, before in segments:
        own = shift + start + np.arange(whole)
        for cut in range(0, whole, _LONGEST):
            size, context = min(_LONGEST, whole - cut), np.concatenate([before, own[:cut]])
            alike[_round_up(size), _round_up(len(context) + size)].append((start + cut, size, context))
    groups = []
    query_index_T = np.zeros(length, np.int64)
    laid = 0
    for members in alike.values():
        queries = max(size for _, size, _ in members)
        keys = max(len(context) + size for _, size, context in members)
        query_GQ = np.zeros((len(members), queries), np.int64)
        key_GK = np.zeros((len(members), keys), np.int64)
        last_GQ = np.zeros((len(members), queries), np.int64)
        for row, (start, size, context) in enumerate(members):
            own = start + np.arange(size)
            query_GQ[row, :size] = own
            key_GK[row, : len(context) + size] = np.concatenate([context, shift + own])
            last_GQ[row, :size] = len(context) + np.arange(size)
            query_index_T[own] = laid + row * queries + np.arange(size)
        laid += len(members) * queries
        arrays = (query_GQ, key_GK, np.zeros_like(last_GQ), last_GQ)
        groups.append(AttentionGroup(*(torch.from_numpy(array) for array in arrays)))
    return tuple(groups), torch.from_numpy(query_index_T)


def _round_up(size: int) -> int:
    return 1 << max(size - 1, 15).bit_length()


def places(where_S: NDArray[np.bool_]) -> Tensor:
    return torch.from_numpy(np.flatnonzero(where_S))


def joined(parts: Iterable[IntArray]) -> Tensor:
    return torch.from_numpy(np.concatenate([_NOTHING, *parts]))
