"""Tokens of a catalog's titles, tokenised once for each text that may follow them in a prompt.

A slot splits the text, so the tokens of a title before a slot end there. Without a slot, the punctuation after a title
is tokenised with it: `",` is one token of most vocabularies.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from trainer.data.prompts.tokenization import TextTokens

_CHARACTERS_PER_TOKEN = 32  # a 100,000 character title is cut before it is tokenised: most of it would be cut anyway
_PUNCTUATION = re.compile(r"[^\w\s]*")


class TitleTokens:
    """Tokens of titles with the text around them, by tail: the punctuation that follows.

    Args:
        titles: `titles[i - 1]` is the title of item i.
        around: text before (a space included) and after each title.
        tails: every punctuation that may follow a title without a slot in between; "" for titles before a slot.
        limit: most tokens per title, `around` and the tail included; a cut title still ends with `around[1]` and its
            tail.
    """

    def __init__(
        self, text: TextTokens, titles: Sequence[str], around: tuple[str, str], tails: Sequence[str], limit: int
    ) -> None:
        before, after = around
        shortened = [_printable(title[: limit * _CHARACTERS_PER_TOKEN]) for title in titles]
        self._end = {tail: text.inside(after + tail) for tail in tails}
        self._titles = {
            tail: [_cut(ids, limit, end) for ids in text.inside_all([before + t + after + tail for t in shortened])]
            for tail, end in self._end.items()
        }

    def whole(self, item: int, tail: str = "") -> list[int]:
        """Tokens of the item's title, tail included, within the limit."""
        return self._titles[tail][item - 1]

    def cut(self, item: int, tail: str, cap: int) -> list[int]:
        """Tokens of the item's title, tail included, cut to at most `cap`."""
        return _cut(self.whole(item, tail), cap, self._end[tail])

    def longest_of_all(self) -> int:
        """Number of tokens of the longest title, over all tails."""
        return max(len(title) for titles in self._titles.values() for title in titles)


def part_behind_title(text: str) -> tuple[str, str]:
    """Split the text that directly follows a title into the title's tail and the rest.

    Tokenizers do not merge across this boundary: it is between punctuation and a letter, a digit or a space.
    """
    found = _PUNCTUATION.match(text)
    assert found is not None, "the pattern also matches the empty string"
    return text[: found.end()], text[found.end() :]


def shared_tokens(a: Sequence[int], b: Sequence[int]) -> int:
    """Number of leading tokens that both have in common."""
    differing = (n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(differing, min(len(a), len(b)))


def _cut(title: list[int], cap: int, end: list[int]) -> list[int]:
    """The title in at most `cap` tokens, of which the last are `end`."""
    if len(title) <= cap:
        return title
    return [*title[: max(cap - len(end), 0)], *end][: max(cap, 0)]


def _printable(title: str) -> str:
    """The title with each lone surrogate, which UTF-8 cannot encode, replaced by `?`."""
    return title.encode("utf-8", "replace").decode("utf-8")
