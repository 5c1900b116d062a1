"""Item sentences of RECFORMER: `title Toy Story brand Disney category Animation`, and histories of them.

An item is flattened into the names and values of its attributes; a history is a start token and its items, the most
recent first. Every token knows what it is part of (its type) and which item it belongs to (its place).

Letters: N items, E tokens of all items joined end to end, B texts of a batch, T tokens of the longest, W words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.data.collators.base import BatchRows
from trainer.data.reading.counter_rng import IntArray, hash64, uniform_integers
from trainer.data.reading.histories import Histories

START, NAME, VALUE, PADDING = range(4)
TYPES = 4
_WORDS, _ACTIONS, _TOKENS = range(3)  # what a random number of the masking is for
NOT_MASKED = -1


@dataclass(frozen=True)
class Sentences:
    """Padded token ids with their types and places, and where they are real."""

    token_BT: Tensor
    type_BT: Tensor
    place_BT: Tensor
    """0 for the start token and padding, 1 for the most recent item, and so on."""
    real_BT: Tensor
    rows: BatchRows

    @property
    def useful_tokens(self) -> int:
        """No LLM reads them."""
        return 0


@dataclass(frozen=True)
class MaskedSentences:
    """Sentences with masked words, and the token that stood there (`NOT_MASKED` elsewhere)."""

    sentences: Sentences
    label_BT: Tensor


@dataclass(frozen=True)
class SentenceWriter:
    """Writes the histories of one catalog for one tokenizer."""

    token_E: IntArray
    type_E: IntArray
    begins_E: np.ndarray
    """Whether a token is the first of its word."""
    offset_N1: IntArray
    start: int
    padding: int
    mask: int
    vocabulary: int
    max_items: int
    max_tokens: int

    def histories(self, histories: Histories) -> list[IntArray]:
        """Each user's text, the most recent item first, as (2, T): where its tokens are, and which item each is of."""
        recent = histories.last(self.max_items)
        bounds = zip(recent.offset_U1[:-1], recent.offset_U1[1:], strict=True)
        return [self._text(recent.item_E[start:stop][::-1]) for start, stop in bounds]

    def items(self, item_M: IntArray) -> list[IntArray]:
        """The same of histories of one item each."""
        return [self._text(item_M[number : number + 1]) for number in range(len(item_M))]

    def pad(self, texts: Sequence[IntArray], rows: BatchRows, length: int) -> Sentences:
        """A batch of `length` tokens a text, the start token included."""
        token_BT = np.full((len(texts), length), self.padding, np.int64)
        type_BT = np.full((len(texts), length), PADDING, np.int64)
        place_BT = np.zeros((len(texts), length), np.int64)
        token_BT[:, 0], type_BT[:, 0] = self.start, START
        for row, (where_T, place_T) in enumerate(texts):
            stretch = slice(1, 1 + len(where_T))
            token_BT[row, stretch] = self.token_E[where_T]
            type_BT[row, stretch] = self.type_E[where_T]
            place_BT[row, stretch] = place_T
        token, kind, place = (torch.from_numpy(x) for x in (token_BT, type_BT, place_BT))
        return Sentences(token, kind, place, kind != PADDING, rows)

    def mask_words(
        self, texts: Sequence[IntArray], sentences: Sentences, share: float, user_B: IntArray, *address: int
    ) -> MaskedSentences:
        """Whole words are chosen; of their tokens 80 % become the mask, 10 % a random token, and 10 % stay (BERT)."""
        token_BT, label_BT = sentences.token_BT.numpy().copy(), np.full(sentences.token_BT.shape, NOT_MASKED, np.int64)
        limit = int(share * 2**64)
        for row, (where_T, _) in enumerate(texts):
            at = (*address, int(user_B[row]))
            word_T = np.cumsum(self.begins_E[where_T])
            chosen = np.flatnonzero(hash64(*at, _WORDS, word_T) < np.uint64(limit))
            action = uniform_integers(10, *at, _ACTIONS, chosen)
            random_token = uniform_integers(self.vocabulary, *at, _TOKENS, chosen)
            stretch = token_BT[row, 1 + chosen]
            label_BT[row, 1 + chosen] = stretch
            token_BT[row, 1 + chosen] = np.where(action < 8, self.mask, np.where(action < 9, random_token, stretch))
        return MaskedSentences(replace(sentences, token_BT=torch.from_numpy(token_BT)), torch.from_numpy(label_BT))

    def _text(self, item_L: IntArray) -> IntArray:
        first_L, length_L = self.offset_N1[item_L - 1], self.offset_N1[item_L] - self.offset_N1[item_L - 1]
        before_L = np.cumsum(length_L) - length_L
        where_T = np.repeat(first_L - before_L, length_L) + np.arange(length_L.sum())
        return np.stack([where_T, np.repeat(1 + np.arange(len(item_L)), length_L)])[:, : self.max_tokens - 1]


def longest(texts: Sequence[IntArray]) -> int:
    """Tokens of the longest text, the start token included."""
    return 1 + max((text.shape[1] for text in texts), default=0)


def write_sentences(
    tokenizer: Any,
    items: Sequence[Mapping[str, str]],
    *,
    max_attribute_tokens: int,
    max_items: int,
    max_tokens: int,
) -> SentenceWriter:
    """Flatten and tokenise a catalog; `items[i - 1]` has the attributes of item i, and empty ones are left out.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
    """
    names = sorted({name for attributes in items for name in attributes})
    name_tokens = {name: _words(tokenizer, [name])[0] for name in names}
    values = [(number, name, value) for number, item in enumerate(items) for name, value in item.items() if value]
    value_tokens = _words(tokenizer, [value for *_, value in values])
    parts: list[list[tuple[int, int, bool]]] = [[] for _ in items]
    for (number, name, _), value in zip(values, value_tokens, strict=True):
        attribute = [(token, NAME, begins) for token, begins in name_tokens[name]]
        attribute += [(token, VALUE, begins) for token, begins in value]
        parts[number] += attribute[:max_attribute_tokens]
    flat = np.array([token for part in parts for token in part], np.int64).reshape(-1, 3)
    offset_N1 = np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int64)
    start = tokenizer.cls_token_id if tokenizer.cls_token_id is not None else tokenizer.bos_token_id
    return SentenceWriter(
        flat[:, 0], flat[:, 1], flat[:, 2].astype(bool), offset_N1, start, tokenizer.pad_token_id or 0,
        tokenizer.mask_token_id, len(tokenizer), max_items, max_tokens,
    )  # fmt: skip


def _words(tokenizer: Any, texts: Sequence[str]) -> list[list[tuple[int, bool]]]:
    """Token ids of each text, and whether each begins a word. The space before a text matters to byte-level ones."""
    if not texts:
        return []
    encoded = tokenizer([f" {text}" for text in texts], add_special_tokens=False, split_special_tokens=True)
    found = []
    for number, tokens in enumerate(encoded["input_ids"]):
        words = encoded.word_ids(number)
        begins = [place == 0 or word != words[place - 1] for place, word in enumerate(words)]
        found.append(list(zip(tokens, begins, strict=True)))
    return found
