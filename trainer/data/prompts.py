"""Prompts: token ids with slots that the model fills with vectors.

Slots are placed while a prompt is assembled and never searched for, so a title that contains `[UserOut]` or
`<|eot_id|>` is only text. Each title is tokenised once, with the space before it, for tokenizers merge the space with
what follows it; see `trainer.data.text_tokens`.

Letters: T tokens of a prompt, S slots of a prompt, R read-outs of a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from trainer.data.randomness import IntArray
from trainer.data.text_tokens import TextTokens, Tokenizer

_MIN_TITLE_TOKENS = 8
_CHARACTERS_A_TOKEN = 32  # no need to tokenise more of a 100,000 character title than could survive the cut


@dataclass(frozen=True)
class Wording:
    """The fixed text of the user and the item prompt."""

    opening: str
    line: str
    """Before the title of one history item; `{number}` counts from 1 and `{date}` is a UTC date."""
    date_separator: str
    separator: str
    title: tuple[str, str]
    """What stands before (a space included) and after a title."""
    closing: str
    item_opening: str
    item_closing: str


WORDINGS: dict[Literal["code", "paper"], Wording] = {
    # The strings of the official code. A line ends before the space, which belongs to the title's tokens.
    "code": Wording(
        opening="This user has made a series of purchases in the following order: ",
        line="Item No.{number}, Time: {date},",
        date_separator="-",
        separator=",",
        title=(' "', '"'),
        closing=". Based on this sequence of purchases, generate user representation token:",
        item_opening="The item title and item embedding are as follows:",
        item_closing=", then generate item representation token:",
    ),
    # Table 2(b) of the paper; its brackets stand for the repeated element and are not text.
    "paper": Wording(
        opening="This user has made a series of purchases in the following order: (History Item List: ",
        line="No.{number} Time: {date} Title:",
        date_separator="/",
        separator=", ",
        title=(" ", ","),
        closing="). Based on this sequence of purchases, generate user representation token:",
        item_opening='The item title and item embedding are as follows: "Title":',
        item_closing=", then generate item representation token:",
    ),
}


USER_SLOT, READOUT_SLOT = 0, -1
"""What a slot is filled with instead of an item's vector: the user's own, or the learned read-out token."""


@dataclass(frozen=True)
class Branch:
    """A continuation of a prompt that the others do not see. Positions count from the branch's first token."""

    after: int
    """How many tokens of the trunk it sees."""
    token_T: IntArray
    slot_S: IntArray
    item_S: IntArray
    readout_R: IntArray


@dataclass(frozen=True)
class Prompt:
    """Token ids. Positions in `slot_S` receive vectors, and the hidden states at `readout_R` are read."""

    token_T: IntArray
    slot_S: IntArray
    """Ascending, as `readout_R`."""
    item_S: IntArray
    """Whose vector: an item, `USER_SLOT` or `READOUT_SLOT`."""
    readout_R: IntArray
    branches: tuple[Branch, ...] = ()

    @property
    def tokens(self) -> int:
        """Of the trunk and the branches."""
        return len(self.token_T) + sum(len(branch.token_T) for branch in self.branches)


class PromptWriter:
    """Writes user and item prompts of one catalog for one tokenizer.

    Args:
        titles: `titles[i - 1]` is the title of item i.
        max_tokens: longest prompt. Longer ones lose title tokens first, then their oldest items, never a slot or the
            read-out.

    Raises:
        ValueError: `max_tokens` cannot hold a prompt with one item.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        titles: Sequence[str],
        wording: Wording,
        *,
        max_title_tokens: int,
        max_tokens: int,
    ) -> None:
        self._text = TextTokens(tokenizer)
        self._wording = wording
        self._max_tokens = max_tokens
        before, after = wording.title
        limit = max_title_tokens * _CHARACTERS_A_TOKEN
        texts = [before + _printable(title[:limit]) + after for title in titles]
        self._title_end = self._text.inside(after)
        self._titles = [self._cut(ids, max_title_tokens) for ids in self._text.inside_all(texts)]
        self._check_start()

    def user_prompt(self, item_L: IntArray, time_L: IntArray) -> Prompt:
        """The history, oldest first, then the read-out token; times in milliseconds since 1970 UTC."""
        closing = self._text.inside(self._wording.closing)
        for first in range(len(item_L)):
            heads = self._heads(time_L[first:])
            titles = [self._titles[item - 1] for item in item_L[first:]]
            fixed = sum(len(head) + 1 for head in heads) + len(closing) + 1
            cap = _largest_cap([len(title) for title in titles], self._max_tokens - fixed)
            if cap >= _MIN_TITLE_TOKENS or first == len(item_L) - 1:
                break
        else:
            raise ValueError("a user prompt needs at least one item of history")
        return self._assemble(heads, [self._cut(title, cap) for title in titles], item_L[first:], closing)

    def item_prompt(self, item: int) -> Prompt:
        """One item's title and vector, then the read-out token."""
        head = self._text.opening(self._wording.item_opening)
        closing = self._text.inside(self._wording.item_closing)
        room = self._max_tokens - len(head) - len(closing) - 2
        return self._assemble([head], [self._cut(self._titles[item - 1], room)], np.array([item]), closing)

    def _assemble(
        self, heads: list[list[int]], titles: list[list[int]], item_S: IntArray, closing: list[int]
    ) -> Prompt:
        tokens: list[int] = []
        slots = []
        for head, title in zip(heads, titles, strict=True):
            tokens += head + title
            slots.append(len(tokens))
            tokens.append(0)
        slots.append(len(tokens) + len(closing))
        tokens += [*closing, 0]
        items = np.append(np.asarray(item_S, np.int64), READOUT_SLOT)
        return Prompt(np.array(tokens, np.int64), np.array(slots, np.int64), items, np.array(slots[-1:], np.int64))

    def _heads(self, time_L: IntArray) -> list[list[int]]:
        """The text before each title, cut off at the preceding slot."""
        heads = []
        for number, day in enumerate(
            np.asarray(time_L).astype("datetime64[ms]").astype("datetime64[D]").astype(str), 1
        ):
            line = self._wording.line.format(number=number, date=day.replace("-", self._wording.date_separator))
            if number == 1:
                heads.append(self._text.opening(self._wording.opening + line))
            else:
                heads.append(self._text.inside(self._wording.separator + line))
        return heads

    def _cut(self, title: list[int], cap: int) -> list[int]:
        """A title of at most `cap` tokens that still ends as titles do."""
        if len(title) <= cap:
            return title
        return [*title[: max(cap - len(self._title_end), 0)], *self._title_end][: max(cap, 0)]

    def _check_start(self) -> None:
        words = self._wording
        first = words.opening + words.line.format(number=1, date="2000-01-01")
        for before in (first, words.item_opening):
            self._text.check_boundary(before, "a".join(words.title))
        fixed = len(self._text.opening(first)) + len(self._text.inside(words.closing)) + 2
        needed = fixed + _MIN_TITLE_TOKENS
        if self._max_tokens < needed:
            raise ValueError(
                f"system.llm.max_tokens={self._max_tokens} cannot hold a prompt with one item: set at least {needed}"
            )


def _printable(title: str) -> str:
    """The title without lone surrogates, which are no characters and cannot be encoded."""
    return title.encode("utf-8", "replace").decode("utf-8")


def _largest_cap(lengths: list[int], budget: int) -> int:
    """The largest c such that titles cut to c tokens fit in the budget; at least the longest title if all fit."""
    if sum(lengths) <= budget:
        return max([*lengths, _MIN_TITLE_TOKENS])
    cap = 0
    while sum(min(length, cap + 1) for length in lengths) <= budget:
        cap += 1
    return cap
