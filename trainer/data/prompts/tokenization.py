"""Tokenises text piece by piece, with the same result as for the whole text.

A prompt is assembled from pieces that are tokenised once. SentencePiece tokenizers (Llama 2, Mistral, Gemma) may
prepend a space to any input, so a piece inside a prompt is tokenised after an anchor, whose tokens are then removed.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Protocol

_CURE = "set system.llm.path to a model with a different tokenizer"
_ANCHORS = ("a", "\n", "0")
"""Texts to tokenise a piece after; any of them works whose last token does not merge with the piece."""


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that prompts use."""

    def __call__(
        self, text: list[str], *, add_special_tokens: bool, split_special_tokens: bool
    ) -> dict[str, list[list[int]]]:
        """Token ids of each text under "input_ids"."""

    def decode(self, token_ids: list[int]) -> str | list[str]:
        """Text of these tokens."""


class TextTokens:
    """Token ids of pieces of text. No piece becomes a special or an added token, even if it spells one out.

    Raises:
        ValueError: the tokenizer changes a text's tokens when it adds its special tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer: Tokenizer = _with_all_added_special(tokenizer)
        self._start = self._native_start()
        self._opening: dict[str, list[int]] = {}
        self._inside: dict[str, list[int]] = {}

    def opening(self, text: str) -> list[int]:
        """Tokens of `text` at the start of a prompt: after the tokenizer's BOS, if it adds one. Cached."""
        if text not in self._opening:
            self._opening[text] = self._start + self._encode([text])[0]
        return self._opening[text]

    def inside(self, text: str) -> list[int]:
        """Tokens of a text that follows other text or a slot. Cached, because dates and numbers repeat."""
        if text not in self._inside:
            [self._inside[text]] = self.inside_all([text])
        return self._inside[text]

    def inside_all(self, texts: Sequence[str]) -> list[list[int]]:
        """As `inside`, for many texts that are not worth caching.

        Raises:
            ValueError: the tokenizer merges a text with every anchor.
        """
        found = []
        for text, ids in zip(texts, self._tokens_after(_ANCHORS[0], texts), strict=True):
            for anchor in _ANCHORS[1:]:
                if ids is None:
                    [ids] = self._tokens_after(anchor, [text])
            if ids is None:
                raise ValueError(
                    f"the tokenizer merges {text[:40]!r} with the text before it and cannot be used: {_CURE}"
                )
            found.append(ids)
        return found

    def decode(self, ids: list[int]) -> str:
        """Text of these tokens."""
        text = self._tokenizer.decode(ids)
        assert isinstance(text, str), "one text for one list of tokens"
        return text

    def check_boundary(self, before: str, after: str) -> None:
        """Check that the tokenizer does not merge across the boundary of these two pieces.

        Raises:
            ValueError: the tokens of the two pieces differ from those of the whole text.
        """
        if self.opening(before) + self.inside(after) != self._start + self._encode([before + after])[0]:
            raise ValueError(f"the tokenizer merges {before[-20:]!r} with {after[:20]!r} and cannot be used: {_CURE}")

    def _tokens_after(self, anchor: str, texts: Sequence[str]) -> list[list[int] | None]:
        """Tokens of each text after those of the anchor; None where the tokenizer merges text and anchor."""
        [before] = self._encode([anchor])
        joined = self._encode([anchor + text for text in texts])
        return [ids[len(before) :] if ids[: len(before)] == before else None for ids in joined]

    def _native_start(self) -> list[int]:
        """Tokens that the tokenizer adds before any text (its BOS, or none)."""
        with_start = self._tokenizer(["a"], add_special_tokens=True, split_special_tokens=True)["input_ids"][0]
        bare = self._encode(["a"])[0]
        for length in range(len(with_start) - len(bare) + 1):
            if with_start[length : length + len(bare)] == bare:
                return with_start[:length]
        raise ValueError(
            f"the tokenizer changes a text's tokens when it adds special tokens and cannot be used: {_CURE}"
        )

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return self._tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def _with_all_added_special(tokenizer: Any) -> Any:
    """The tokenizer, or a copy of it that also splits added tokens not marked special (`split_special_tokens`).

    Qwen's `<think>` is such a token, and would otherwise be matched in a title.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    if all(token.special for token in added) or not hasattr(tokenizer, "backend_tokenizer"):
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.add_special_tokens([token.content for token in added])
    return tokenizer
