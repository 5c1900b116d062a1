"""Text to token ids, piece by piece, with the tokens of the whole text.

A prompt is put together from pieces that are tokenised once. SentencePiece tokenizers (Llama 2, Mistral, Gemma) may put
a space before whatever they are given, so a piece inside a prompt is tokenised behind an anchor that is cut off again.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Protocol

_ANCHORS = ("a", "\n", "0")
"""Texts to stand before a piece. Any will do whose last token does not merge with the piece."""


class Tokenizer(Protocol):
    """What prompts need of a Hugging Face tokenizer."""

    def __call__(
        self, text: list[str], *, add_special_tokens: bool, split_special_tokens: bool
    ) -> dict[str, list[list[int]]]:
        """Token ids of each text under "input_ids"."""

    def decode(self, token_ids: list[int]) -> str | list[str]:
        """The text of these tokens."""


class TextTokens:
    """Token ids of pieces of text. No piece can become a special or an added token, whatever it says.

    Raises:
        ValueError: the tokenizer changes a text's tokens when it adds its own start.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer: Tokenizer = _literal(tokenizer)
        self._start = self._native_start()
        self._opening: dict[str, list[int]] = {}
        self._inside: dict[str, list[int]] = {}

    def opening(self, text: str) -> list[int]:
        """The tokens that the tokenizer puts before any text (its BOS, or nothing), then those of `text`."""
        if text not in self._opening:
            self._opening[text] = self._start + self._encode([text])[0]
        return self._opening[text]

    def inside(self, text: str) -> list[int]:
        """Tokens of a text that other text or a slot precedes, remembered: dates and numbers repeat all the time."""
        if text not in self._inside:
            [self._inside[text]] = self.inside_all([text])
        return self._inside[text]

    def inside_all(self, texts: Sequence[str]) -> list[list[int]]:
        """As `inside`, of many texts that are not worth remembering.

        Raises:
            ValueError: the tokenizer merges a text with all that may stand before it.
        """
        found = []
        for text, ids in zip(texts, self._behind(_ANCHORS[0], texts), strict=True):
            for anchor in _ANCHORS[1:]:
                if ids is None:
                    [ids] = self._behind(anchor, [text])
            if ids is None:
                raise ValueError(f"the tokenizer merges {text[:40]!r} with what precedes it; it cannot be used here")
            found.append(ids)
        return found

    def decode(self, ids: list[int]) -> str:
        """The text of these tokens."""
        text = self._tokenizer.decode(ids)
        assert isinstance(text, str), "one text for one list of tokens"
        return text

    def check_boundary(self, before: str, after: str) -> None:
        """Refuse a tokenizer that merges over the boundary of these two pieces.

        Raises:
            ValueError: the tokens of the two pieces are not those of the whole text.
        """
        if self.opening(before) + self.inside(after) != self._start + self._encode([before + after])[0]:
            raise ValueError(f"the tokenizer merges {before[-20:]!r} with {after[:20]!r}; it cannot be used here")

    def _behind(self, anchor: str, texts: Sequence[str]) -> list[list[int] | None]:
        """What follows the anchor's own tokens; None where they merge with the text."""
        [before] = self._encode([anchor])
        behind = self._encode([anchor + text for text in texts])
        return [ids[len(before) :] if ids[: len(before)] == before else None for ids in behind]

    def _native_start(self) -> list[int]:
        with_start = self._tokenizer(["a"], add_special_tokens=True, split_special_tokens=True)["input_ids"][0]
        bare = self._encode(["a"])[0]
        for length in range(len(with_start) - len(bare) + 1):
            if with_start[length : length + len(bare)] == bare:
                return with_start[:length]
        raise ValueError(
            "the tokenizer changes a text's tokens when it adds its special tokens; it cannot be used here"
        )

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return self._tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def _literal(tokenizer: Any) -> Any:
    """The tokenizer, or a copy for which `split_special_tokens` splits all added tokens.

    Qwen's `<think>` is added but not marked special, and would else be found in a title.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    if all(token.special for token in added) or not hasattr(tokenizer, "backend_tokenizer"):
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.add_special_tokens([token.content for token in added])
    return tokenizer
