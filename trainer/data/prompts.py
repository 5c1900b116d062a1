"""Prompts: token ids with slots that the model fills with vectors.

Slots are placed while a prompt is assembled and never searched for, so a title that contains `[UserOut]` or
`<|eot_id|>` is only text. Each title is tokenised once, with the space before it, for tokenizers merge the space with
what follows it; see `trainer.data.text_tokens`.

Letters: T tokens, S slots, R positions read out, L items of a history, C candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from trainer.data.randomness import IntArray
from trainer.data.text_tokens import TextTokens, Tokenizer
from trainer.data.wordings import Wording

USER_SLOT = 0
"""In `item_S`: the vector of the prompt's user."""
READOUT_SLOT = -1
"""In `item_S`: the learned token behind which a representation is read, [UserOut] or [ItemOut]."""

_MIN_TITLE_TOKENS = 8
_CHARACTERS_A_TOKEN = 32  # no need to tokenise more of a 100,000 character title than could survive the cut


@dataclass(frozen=True)
class Branch:
    """One of several continuations of a prompt, which do not see each other. Positions count from its own start."""

    after: int
    """How many of the prompt's own tokens it sees."""
    token_T: IntArray
    slot_S: IntArray
    item_S: IntArray
    readout_R: IntArray


@dataclass(frozen=True)
class Prompt:
    """Token ids; the positions `slot_S` receive vectors, at the positions `readout_R` the hidden state is read.

    `item_S` says which vector: an item's (its id, from 1), `USER_SLOT` or `READOUT_SLOT`.
    """

    token_T: IntArray
    slot_S: IntArray
    item_S: IntArray
    readout_R: IntArray
    branches: tuple[Branch, ...] = ()

    @property
    def tokens(self) -> int:
        """Of the trunk and the branches."""
        return len(self.token_T) + sum(len(branch.token_T) for branch in self.branches)


class PromptWriter:
    """Writes the prompts of one catalog for one tokenizer.

    Args:
        titles: `titles[i - 1]` is the title of item i.
        max_tokens: longest prompt, its answer included. Longer ones lose title tokens first, then their oldest items,
            never a candidate, a slot, a read-out or the answer.
        choices: candidates that a choice prompt lists; 0 where none is written.

    Raises:
        ValueError: `max_tokens` cannot hold a prompt with one item, or the tokenizer has no token that ends an answer.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        titles: Sequence[str],
        wording: Wording,
        *,
        max_title_tokens: int,
        max_tokens: int,
        choices: int = 0,
    ) -> None:
        self._text = TextTokens(tokenizer)
        self._wording = wording
        self._max_tokens = max_tokens
        limit = max_title_tokens * _CHARACTERS_A_TOKEN
        printable = [_printable(title[:limit]) for title in titles]
        self._titles = self._encode_titles(printable, wording.title, max_title_tokens)
        self._answers = self._titles
        self.end_token = _end_token(tokenizer) if choices else -1
        if choices and wording.answer != wording.title:
            self._answers = self._encode_titles(printable, wording.answer, max_title_tokens)
        self._check_boundaries()
        self._check_room(choices, max_title_tokens)

    @property
    def shows_user(self) -> bool:
        """Whether user prompts begin with the user's vector."""
        return bool(self._wording.user)

    def user_prompt(self, item_L: IntArray, time_L: IntArray) -> Prompt:
        """The history, oldest first, then the read-out token; times in milliseconds since 1970 UTC."""
        closing = self._text.inside(self._wording.closing)
        draft = self._history(item_L, time_L, [], len(closing) + 1)[0]
        draft.write(closing)
        draft.put(READOUT_SLOT)
        return draft.prompt()

    def user_prompts(self, item_L: IntArray, time_L: IntArray, seen_W: IntArray) -> list[Prompt]:
        """Prompts that read the first `seen_W[w]` items for each w, ascending up to all: a read-out each, in order.

        One prompt that branches before each target, where everything fits. What is cut from a prompt depends on all
        that it shows, so where something has to be cut there is one prompt a target.
        """
        closing = self._text.inside(self._wording.closing)
        draft, cap = self._history(item_L, time_L, [], len(closing) + 1)
        whole = len(draft.ends) == len(item_L) and cap >= max(len(self._titles[item - 1]) for item in item_L)
        if len(seen_W) == 1 or not whole:
            return [self.user_prompt(item_L[:seen], time_L[:seen]) for seen in seen_W]
        end = _column([len(closing)])
        leaf = (_column([*closing, 0]), end, _column([READOUT_SLOT]), end)
        branches = tuple(Branch(draft.ends[seen - 1], *leaf) for seen in seen_W)
        return [replace(draft.prompt(), readout_R=end[:0], branches=branches)]

    def item_prompt(self, item: int) -> Prompt:
        """One item's title and vector, then the read-out token."""
        closing = self._text.inside(self._wording.item_closing)
        draft = _Draft(list(self._text.opening(self._wording.item_opening)))
        room = self._max_tokens - len(draft.tokens) - len(closing) - 2
        self._write_title(draft, item, room)
        draft.write(closing)
        draft.put(READOUT_SLOT)
        return draft.prompt()

    def choice_prompt(self, item_L: IntArray, time_L: IntArray, candidate_C: IntArray) -> Prompt:
        """The history and the titles to choose from, in the order given; the answer follows the last token."""
        choice, end = self._text.inside(self._wording.choice), self._text.inside(self._wording.choice_end)
        separator = self._text.inside(self._wording.choice_separator)
        answer = max(len(self.answer(int(item))) for item in candidate_C)
        rest = len(choice) + len(end) + (len(candidate_C) - 1) * len(separator) + answer
        draft, cap = self._history(item_L, time_L, candidate_C.tolist(), rest)
        draft.write(choice)
        for number, item in enumerate(candidate_C.tolist()):
            draft.write(separator if number else [])
            self._write_title(draft, item, cap)
        draft.write(end)
        return draft.prompt()

    @property
    def longest_answer(self) -> int:
        """Tokens of the longest answer, its end token included."""
        return max(len(title) for title in self._answers) + 1

    def text(self, tokens: list[int]) -> str:
        """What the tokens of an answer say."""
        return self._text.decode(tokens)

    def answer(self, item: int) -> list[int]:
        """The tokens with which a choice prompt is answered: the title, never cut to fit, and the end token."""
        return [*self._answers[item - 1], self.end_token]

    def _history(self, item_L: IntArray, time_L: IntArray, others: list[int], rest: int) -> tuple[_Draft, int]:
        """A prompt up to its last history line, and the length to which its titles are cut.

        Args:
            others: items further on whose titles may be cut too.
            rest: tokens that follow besides them.
        """
        slot = int(self._wording.item_slots)
        draft = _Draft([])
        if self._wording.user:
            draft.write(self._text.opening(self._wording.user))
            draft.put(USER_SLOT)
        for first in range(len(item_L)):
            shown, heads = item_L[first:].tolist(), self._heads(time_L[first:])
            titles = [len(self._titles[item - 1]) for item in [*shown, *others]]
            fixed = len(draft.tokens) + sum(map(len, heads)) + slot * len(titles) + rest
            cap = _largest_cap(titles, self._max_tokens - fixed)
            if cap >= _MIN_TITLE_TOKENS or first == len(item_L) - 1:
                break
        else:
            raise ValueError("a user prompt needs at least one item of history")
        for head, item in zip(heads, shown, strict=True):
            draft.write(head)
            self._write_title(draft, item, cap)
            draft.ends.append(len(draft.tokens))
        return draft, cap

    def _write_title(self, draft: _Draft, item: int, cap: int) -> None:
        draft.write(_cut(self._titles[item - 1], cap, self._text.inside(self._wording.title[1])))
        if self._wording.item_slots:
            draft.put(item)

    def _heads(self, time_L: IntArray) -> list[list[int]]:
        """The text before each title, cut off at the preceding slot."""
        heads = []
        for number, day in enumerate(
            np.asarray(time_L).astype("datetime64[ms]").astype("datetime64[D]").astype(str), 1
        ):
            line = self._wording.line.format(number=number, date=day.replace("-", self._wording.date_separator))
            before = self._wording.separator if number > 1 else self._wording.opening
            first = number == 1 and not self._wording.user
            heads.append((self._text.opening if first else self._text.inside)(before + line))
        return heads

    def _encode_titles(self, titles: list[str], around: tuple[str, str], limit: int) -> list[list[int]]:
        end = self._text.inside(around[1])
        texts = [around[0] + title + around[1] for title in titles]
        return [_cut(ids, limit, end) for ids in self._text.inside_all(texts)]

    def _check_boundaries(self) -> None:
        words = self._wording
        first = words.opening + words.line.format(number=1, date="2000-01-01")
        for before in (first, words.item_opening):
            self._text.check_boundary(before, "a".join(words.title))

    def _check_room(self, choices: int, longest_title: int) -> None:
        words = self._wording
        texts = [words.user, words.opening + words.line.format(number=1, date="2000-01-01")]
        if choices:
            what = f"one item and {choices} candidates"
            texts += [words.choice, words.choice_end, *[words.choice_separator] * (choices - 1)]
            rest = longest_title + 1
        else:
            what = "one item"
            texts.append(words.closing)
            rest = 1
        opening, *inside = [text for text in texts if text]
        needed = len(self._text.opening(opening)) + sum(len(self._text.inside(text)) for text in inside) + rest
        needed += (1 + choices) * (_MIN_TITLE_TOKENS + words.item_slots) + bool(words.user)
        if self._max_tokens < needed:
            raise ValueError(
                f"system.llm.max_tokens={self._max_tokens} cannot hold a prompt with {what}: set at least {needed}"
            )


@dataclass
class _Draft:
    """A prompt under construction."""

    tokens: list[int]
    slots: list[int] = field(default_factory=list)
    items: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    """Length up to each item of the history."""

    def write(self, tokens: list[int]) -> None:
        self.tokens += tokens

    def put(self, item: int) -> None:
        self.slots.append(len(self.tokens))
        self.items.append(item)
        self.tokens.append(0)

    def prompt(self) -> Prompt:
        """Read out at the last token."""
        readout = [len(self.tokens) - 1]
        return Prompt(_column(self.tokens), _column(self.slots), _column(self.items), _column(readout))


def _column(values: list[int]) -> IntArray:
    return np.array(values, np.int64)


def _cut(title: list[int], cap: int, end: list[int]) -> list[int]:
    """A title of at most `cap` tokens that still ends as titles do."""
    if len(title) <= cap:
        return title
    return [*title[: max(cap - len(end), 0)], *end][: max(cap, 0)]


def _end_token(tokenizer: Tokenizer) -> int:
    end: int | None = getattr(tokenizer, "eos_token_id", None)
    if end is None:
        raise ValueError("the tokenizer has no end-of-sequence token to end an answer with: set eos_token in its files")
    return end


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
