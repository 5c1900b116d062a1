"""Item sentences of RECFORMER (`title Toy Story brand Disney category Animation`), and histories of them.

An item is flattened into the names and values of its attributes; a history is a start token followed by its items, the
most recent first. Each token has a type (what it is part of) and the position of its item in the history.

Letters: N items, E tokens of all items joined end to end, B texts of a batch, T tokens of a text (of the longest, where
padded), M items of a batch, L items of a history.
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
"""Token types: the start token, an attribute's name, its value, and padding."""
TYPES = 4
_WORDS, _ACTIONS, _TOKENS = range(3)  # domain tags of masking draws: which words, which action, which random token
NOT_MASKED = -1
"""Label of tokens without a masked-word loss."""


@dataclass(frozen=True)
class Sentences:
    """A padded batch of texts: token ids, token types and item positions."""

    token_BT: Tensor
    type_BT: Tensor
    place_BT: Tensor
    """Item position of each token: 1 for the most recent item, 2 for the one before, 0 for start token and padding."""
    real_BT: Tensor
    """True where a token is not padding."""
    rows: BatchRows

    @property
    def useful_tokens(self) -> int:
        """Always 0: no LLM reads these texts (see `HistoryBatch.useful_tokens`)."""
        return 0


@dataclass(frozen=True)
class MaskedSentences:
    """Sentences with masked words, and the original token ids at masked positions (`NOT_MASKED` elsewhere)."""

    sentences: Sentences
    label_BT: Tensor
    position_M: Tensor
    """Masked positions, as indices into the flattened table."""


@dataclass(frozen=True)
class SentenceWriter:
    """Writes items and histories of one catalog for one tokenizer."""

    token_E: IntArray
    """Token ids of all items, end to end."""
    type_E: IntArray
    """`NAME` or `VALUE`."""
    begins_E: np.ndarray
    """True for the first token of each word."""
    offset_N1: IntArray
    """Item i's tokens are `token_E[offset_N1[i - 1]:offset_N1[i]]`."""
    start: int
    """Id of the start token (CLS, else BOS)."""
    padding: int
    """Id of the padding token."""
    mask: int
    """Id of the mask token."""
    vocabulary: int
    """Size of the vocabulary, from which masking draws random tokens."""
    max_items: int
    """Items written per history, the latest ones."""
    max_tokens: int
    """Tokens of the longest text, the start token included; the oldest tokens are cut."""

    def histories(self, histories: Histories) -> list[IntArray]:
        """Each user's text, most recent item first, as (2, T): indices into `token_E`, and item positions from 1."""
        recent = histories.last(self.max_items)
        bounds = zip(recent.offset_U1[:-1], recent.offset_U1[1:], strict=True)
        return [self._text(recent.item_E[start:stop][::-1]) for start, stop in bounds]

    def items(self, item_M: IntArray) -> list[IntArray]:
        """Texts of histories of one item each, in the format of `histories`."""
        return [self._text(item_M[index : index + 1]) for index in range(len(item_M))]

    def pad(self, texts: Sequence[IntArray], rows: BatchRows, length: int) -> Sentences:
        """Prepend the start token and pad to `length` tokens per text, the start token included."""
        token_BT = np.full((len(texts), length), self.padding, np.int64)
        type_BT = np.full((len(texts), length), PADDING, np.int64)
        place_BT = np.zeros((len(texts), length), np.int64)
        token_BT[:, 0], type_BT[:, 0] = self.start, START
        for row, (where_T, place_T) in enumerate(texts):
            columns = slice(1, 1 + len(where_T))
            token_BT[row, columns] = self.token_E[where_T]
            type_BT[row, columns] = self.type_E[where_T]
            place_BT[row, columns] = place_T
        token, kind, place = (torch.from_numpy(x) for x in (token_BT, type_BT, place_BT))
        return Sentences(token, kind, place, kind != PADDING, rows)

    def mask_words(
        self, texts: Sequence[IntArray], sentences: Sentences, share: float, user_B: IntArray, *address: int
    ) -> MaskedSentences:
        """Mask whole words (BERT): of the chosen words' tokens, 80 % become the mask, 10 % a random token, 10 % stay.

        Args:
            sentences: the padded `texts`.
            share: probability that a word is chosen, below 1.
            user_B: user of each text; the draws depend on it and on `address` alone.
        """
        token_BT, label_BT = sentences.token_BT.numpy().copy(), np.full(sentences.token_BT.shape, NOT_MASKED, np.int64)
        limit = int(share * 2**64)  # a word is chosen if its 64-bit hash is below this
        for row, (where_T, _) in enumerate(texts):
            at = (*address, int(user_B[row]))
            word_T = np.cumsum(self.begins_E[where_T])  # tokens of one word share a number, and so a draw
            chosen = np.flatnonzero(hash64(*at, _WORDS, word_T) < np.uint64(limit))
            action = uniform_integers(10, *at, _ACTIONS, chosen)
            random_token = uniform_integers(self.vocabulary, *at, _TOKENS, chosen)
            original = token_BT[row, 1 + chosen]  # column 0 holds the start token
            label_BT[row, 1 + chosen] = original
            token_BT[row, 1 + chosen] = np.where(action < 8, self.mask, np.where(action < 9, random_token, original))
        position_M = np.flatnonzero(label_BT != NOT_MASKED)
        token, label, position = (torch.from_numpy(x) for x in (token_BT, label_BT, position_M))
        return MaskedSentences(replace(sentences, token_BT=token), label, position)

    def _text(self, item_L: IntArray) -> IntArray:
        """The items in the order given, as (2, T): indices into `token_E`, and item positions from 1."""
        first_L, length_L = self.offset_N1[item_L - 1], self.offset_N1[item_L] - self.offset_N1[item_L - 1]
        before_L = np.cumsum(length_L) - length_L
        where_T = np.repeat(first_L - before_L, length_L) + np.arange(length_L.sum())
        return np.stack([where_T, np.repeat(1 + np.arange(len(item_L)), length_L)])[:, : self.max_tokens - 1]


def longest(texts: Sequence[IntArray]) -> int:
    """Length of the longest text in tokens, the start token included; 1 without texts."""
    return 1 + max((text.shape[1] for text in texts), default=0)


def sentence_writer(
    tokenizer: Any,
    items: Sequence[Mapping[str, str]],
    *,
    max_attribute_tokens: int,
    max_items: int,
    max_tokens: int,
) -> SentenceWriter:
    """Flatten and tokenise a catalog.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        items: `items[i - 1]` holds the attributes of item i; those with an empty value are left out.
        max_attribute_tokens: tokens kept per attribute, those of its name included.
        max_items: see `SentenceWriter.max_items`.
        max_tokens: see `SentenceWriter.max_tokens`.
    """
    names = sorted({name for attributes in items for name in attributes})
    name_tokens = {name: _words(tokenizer, [name])[0] for name in names}
    values = [(index, name, value) for index, item in enumerate(items) for name, value in item.items() if value]
    value_tokens = _words(tokenizer, [value for *_, value in values])
    parts: list[list[tuple[int, int, bool]]] = [[] for _ in items]
    for (index, name, _), value in zip(values, value_tokens, strict=True):
        attribute = [(token, NAME, begins) for token, begins in name_tokens[name]]
        attribute += [(token, VALUE, begins) for token, begins in value]
        parts[index] += attribute[:max_attribute_tokens]
    # The reshape gives an empty array its three columns.
    flat = np.array([token for part in parts for token in part], np.int64).reshape(-1, 3)
    offset_N1 = np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int64)
    start = tokenizer.cls_token_id if tokenizer.cls_token_id is not None else tokenizer.bos_token_id
    return SentenceWriter(
        flat[:, 0], flat[:, 1], flat[:, 2].astype(bool), offset_N1, start, tokenizer.pad_token_id or 0,
        tokenizer.mask_token_id, len(tokenizer), max_items, max_tokens,
    )  # fmt: skip


def _words(tokenizer: Any, texts: Sequence[str]) -> list[list[tuple[int, bool]]]:
    """Token ids of each text, each with whether it begins a word."""
    if not texts:
        return []
    # Texts are joined by spaces, and byte-level tokenizers merge a space into the word after it. A special token that
    # a text spells out stays text (`split_special_tokens`).
    encoded = tokenizer([f" {text}" for text in texts], add_special_tokens=False, split_special_tokens=True)
    found = []
    for index, tokens in enumerate(encoded["input_ids"]):
        words = encoded.word_ids(index)
        begins = [position == 0 or word != words[position - 1] for position, word in enumerate(words)]
        found.append(list(zip(tokens, begins, strict=True)))
    return found
