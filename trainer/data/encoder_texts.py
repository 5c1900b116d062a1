"""Texts for text encoders: tokenised once per catalog, right-padded per batch.

Letters: N texts, E tokens of all texts joined end to end, B texts of a batch, T tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from trainer.data.collators.base import BatchRows
from trainer.data.reading.counter_rng import IntArray
from trainer.data.reading.histories import Histories


class TextTokenizer(Protocol):
    """The part of a Hugging Face tokenizer that this module uses."""

    pad_token_id: int | None

    def __call__(
        self,
        text: list[str],
        *,
        add_special_tokens: bool,
        split_special_tokens: bool,
        truncation: bool,
        max_length: int,
    ) -> dict[str, list[list[int]]]:
        """Token ids of each text under "input_ids"."""


@dataclass(frozen=True)
class PaddedTexts:
    """A right-padded batch of token ids."""

    token_BT: Tensor
    real_BT: Tensor
    """True where a token is not padding."""
    rows: BatchRows


@dataclass(frozen=True)
class TokenLists:
    """Token ids of N texts, end to end."""

    token_E: IntArray
    offset_N1: IntArray
    """Text n's tokens are `token_E[offset_N1[n]:offset_N1[n + 1]]`, n from 0."""
    padding: int
    """Id of the tokenizer's padding token."""

    @property
    def length_N(self) -> IntArray:
        return np.diff(self.offset_N1)

    def padded(self, text_B: IntArray, rows: BatchRows, length: int | None = None) -> PaddedTexts:
        """Texts with the indices `text_B`, padded to `length` tokens; None: to the longest of them."""
        length_B = self.length_N[text_B]
        width = int(length_B.max(initial=1)) if length is None else length
        index_BT = self.offset_N1[text_B][:, None] + np.arange(width)[None, :]
        real_BT = np.arange(width)[None, :] < length_B[:, None]
        # Indices of padding may be past the last token: clamp them, the values are not used.
        token_BT = np.where(real_BT, self.token_E[np.minimum(index_BT, len(self.token_E) - 1)], self.padding)
        return PaddedTexts(torch.from_numpy(token_BT), torch.from_numpy(real_BT), rows)


def tokenize(tokenizer: TextTokenizer, texts: Sequence[str], max_tokens: int) -> TokenLists:
    """Tokenise texts with the tokenizer's own special tokens, each cut to `max_tokens` tokens, special tokens included.

    A special token that a text spells out stays text.
    """
    lists = tokenizer(
        list(texts), add_special_tokens=True, split_special_tokens=True, truncation=True, max_length=max_tokens
    )["input_ids"]
    return joined(lists, tokenizer.pad_token_id or 0)


def joined(lists: Sequence[Sequence[int]], padding: int) -> TokenLists:
    """Join lists of token ids end to end."""
    lengths = [len(tokens) for tokens in lists]
    token_E = np.concatenate([np.zeros(0, np.int64), *(np.asarray(tokens, np.int64) for tokens in lists)])
    return TokenLists(token_E, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), padding)


_OPENING, _SEPARATOR, _CLOSING = "This user has bought:", ";", "."


@dataclass(frozen=True)
class HistoryWriter:
    """Writes histories as `This user has bought: TITLE; TITLE.` from titles tokenised once per catalog."""

    titles: TokenLists
    """Titles of items 1 to N, without special tokens."""
    opening: tuple[int, ...]
    """Tokens before the first title, special tokens included."""
    separator: tuple[int, ...]
    """Tokens between two titles."""
    closing: tuple[int, ...]
    """Tokens after the last title, special tokens included."""
    max_history: int
    """Titles per sentence, those of the latest items."""

    @property
    def longest(self) -> int:
        """Upper bound on the tokens of a sentence."""
        title = int(self.titles.length_N.max())
        return len(self.opening) + len(self.closing) + self.max_history * (title + len(self.separator))

    def histories(self, histories: Histories) -> TokenLists:
        """One sentence per user, of the latest `max_history` items, oldest first."""
        recent = histories.last(self.max_history)
        bounds = zip(recent.offset_U1[:-1], recent.offset_U1[1:], strict=True)
        return joined([self._sentence(recent.item_E[start:stop]) for start, stop in bounds], self.titles.padding)

    def items(self, item_M: IntArray) -> TokenLists:
        """One sentence per item, as of a history of that item alone."""
        return joined([self._sentence(item_M[index : index + 1]) for index in range(len(item_M))], self.titles.padding)

    def _sentence(self, item_L: IntArray) -> list[int]:
        tokens = list(self.opening)
        for index, item in enumerate(item_L):
            tokens += self.separator if index else ()
            tokens += self.titles.token_E[self.titles.offset_N1[item - 1] : self.titles.offset_N1[item]].tolist()
        return [*tokens, *self.closing]


def history_writer(tokenizer: Any, titles: Sequence[str], *, max_tokens: int, max_history: int) -> HistoryWriter:
    """Build the writer of one catalog for one Hugging Face tokenizer; a title keeps at most `max_tokens` tokens."""
    plain = {"add_special_tokens": False, "split_special_tokens": True}
    # A title follows a space, which byte-level tokenizers merge into its first word.
    lists = tokenizer([f" {title}" for title in titles], truncation=True, max_length=max_tokens, **plain)["input_ids"]
    opening, separator, closing = tokenizer([_OPENING, _SEPARATOR, _CLOSING], **plain)["input_ids"]
    before, after = _special_tokens(tokenizer)
    words = joined(lists, tokenizer.pad_token_id or 0)
    return HistoryWriter(words, (*before, *opening), tuple(separator), (*closing, *after), max_history)


def _special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Special tokens that the tokenizer adds before and after a text."""
    with_special = tokenizer(["a"], add_special_tokens=True)["input_ids"][0]
    bare = tokenizer(["a"], add_special_tokens=False)["input_ids"][0]
    start = next(n for n in range(len(with_special)) if with_special[n : n + len(bare)] == bare)
    return with_special[:start], with_special[start + len(bare) :]
