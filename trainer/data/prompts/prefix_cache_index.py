"""Rows of a prefix cache: one per token before the first slots of all item prompts, shared prefixes once.

They depend on the catalog, the tokenizer and the prompt template alone, so prompts are packed without reading the file,
which `trainer/nn/llm/prefix_cache.py` writes and opens.

Letters: M rows, T tokens of a prefix or of a segment.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from trainer.data.prompts.packing import Stream, StreamWriter, prefix_tokens, write_prefixes
from trainer.data.prompts.prompt import Prompt
from trainer.data.prompts.writer import PromptWriter
from trainer.data.reading.counter_rng import IntArray


@dataclass(frozen=True)
class Part:
    """Consecutive rows that one pass through the decoder computes."""

    first: int
    """Index of the first row."""
    before_M: IntArray
    """Earlier rows, whose keys precede those of the stream."""
    stream: Stream


@dataclass(frozen=True)
class PrefixCacheIndex:
    """The rows of one catalog's prefix cache."""

    token_M: IntArray
    """Token id of each row."""
    segments: Sequence[tuple[int, int, IntArray]]
    """As in `StreamWriter`; the context of a segment consists of earlier rows."""
    by_prefix: Mapping[bytes, IntArray]
    """Rows of each prefix, keyed by the bytes of its tokens."""

    @classmethod
    def of_items(cls, writer: PromptWriter, num_items: int) -> PrefixCacheIndex:
        """Index the item prompts of items 1 to N."""
        return cls.of_prompts([writer.item_prompt(item) for item in range(1, num_items + 1)])

    @classmethod
    def of_prompts(cls, prompts: Sequence[Prompt]) -> PrefixCacheIndex:
        """Index the tokens before the first slots of these prompts."""
        prefixes = [prefix_tokens(prompt) for prompt in prompts]
        stream = StreamWriter()
        rows = write_prefixes(stream, prefixes)
        by_prefix = {token_T.tobytes(): row_T for token_T, row_T in zip(prefixes, rows, strict=True)}
        return cls(np.concatenate([np.zeros(0, np.int64), *stream.tokens]), stream.segments, by_prefix)

    def __len__(self) -> int:
        return len(self.token_M)

    @property
    def sha256(self) -> str:
        """Hex digest of all prefixes and their rows."""
        digest = hashlib.sha256()
        for tokens, row_T in self.by_prefix.items():
            digest.update(tokens)
            digest.update(row_T.tobytes())
        return digest.hexdigest()

    def parts(self, tokens: int) -> Iterator[Part]:
        """Yield all rows in order, at most `tokens` per part; no segment may be longer than `tokens`."""
        at = 0
        while at < len(self.segments):
            first, members = self.segments[at][0], []
            while at < len(self.segments) and self.segments[at][0] + self.segments[at][1] <= first + tokens:
                members.append(self.segments[at])
                at += 1
            yield self._part(first, members)

    def _part(self, first: int, members: Sequence[tuple[int, int, IntArray]]) -> Part:
        """The segments `members` as a stream; contexts become indices into the keys of `before_M`, then its own."""
        before_M = np.unique(np.concatenate([row_T[row_T < first] for _, _, row_T in members]))
        stream = StreamWriter(shift=len(before_M))
        for start, size, row_T in members:
            context_T = np.where(row_T < first, np.searchsorted(before_M, row_T), len(before_M) + row_T - first)
            stream.add(self.token_M[start : start + size], context_T)
        return Part(first, before_M, stream.finish())
