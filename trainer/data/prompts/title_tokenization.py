"""Tokens of a catalog's titles, each tokenised once for whatever may follow it in a prompt.

A vector's slot cuts a text into segments, so a title before a slot ends there. Where no slot stands behind titles, the
punctuation that follows belongs to them: `",` is one token of most vocabularies.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from trainer.data.prompts.tokenization import TextTokens

_CHARACTERS_A_TOKEN = 32  # no need to tokenise more of a 100,000 character title than could survive the cut
_PUNCTUATION = re.compile(r"[^\w\s]*")


class TitleTokens:
    """The titles between what stands around them, by their tail: the punctuation that follows.

    Args:
        titles: `titles[i - 1]` is the title of item i.
        around: what stands before (a space included) and after each.
        tails: all that may follow one without a slot between; "" where there is a slot.
        limit: a title keeps at most this many tokens, and ends as titles do.
    """

    def __init__(
        self, text: TextTokens, titles: Sequence[str], around: tuple[str, str], tails: Sequence[str], limit: int
    ) -> None:
        before, after = around
        shortened = [_printable(title[: limit * _CHARACTERS_A_TOKEN]) for title in titles]
        self._end = {tail: text.inside(after + tail) for tail in tails}
        self._titles = {
            tail: [_cut(ids, limit, end) for ids in text.inside_all([before + t + after + tail for t in shortened])]
            for tail, end in self._end.items()
        }

    def whole(self, item: int, tail: str = "") -> list[int]:
        """The item's title up to its tail."""
        return self._titles[tail][item - 1]

    def cut(self, item: int, tail: str, cap: int) -> list[int]:
        """The same in at most `cap` tokens."""
        return _cut(self.whole(item, tail), cap, self._end[tail])

    def longest_of_all(self) -> int:
        """Tokens of the longest title."""
        return max(len(title) for titles in self._titles.values() for title in titles)


def part_behind_title(text: str) -> tuple[str, str]:
    """A text that follows a title at once, parted into the title's tail and the rest.

    Tokenizers do not merge over that boundary: it lies between punctuation and a letter, a digit or a space.
    """
    found = _PUNCTUATION.match(text)
    assert found is not None, "it matches nothing at least"
    return text[: found.end()], text[found.end() :]


def shared_tokens(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens the two begin with alike."""
    differing = (n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(differing, min(len(a), len(b)))


def _cut(title: list[int], cap: int, end: list[int]) -> list[int]:
    """A title of at most `cap` tokens that still ends as titles do."""
    if len(title) <= cap:
        return title
    return [*title[: max(cap - len(end), 0)], *end][: max(cap, 0)]


def _printable(title: str) -> str:
    """The title without lone surrogates, which are no characters and cannot be encoded."""
    return title.encode("utf-8", "replace").decode("utf-8")
