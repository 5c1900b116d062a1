"""Writes prompts: token ids with slots that the model fills with injected embeddings.

Slots are placed while a prompt is assembled and never searched for, so a title that contains `[UserOut]` or
`<|eot_id|>` is plain text. Each title is tokenised once, with the space before it, because tokenizers merge a space
into what follows it; see `trainer.data.prompts.tokenization` and `trainer.data.prompts.title_tokenization`.

Letters: T tokens, S slots, R read-outs, L items of a history, W targets of a user, C candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from trainer.data.prompts.prompt import READOUT_SLOT, USER_SLOT, Branch, Prompt
from trainer.data.prompts.templates import PromptTemplate
from trainer.data.prompts.title_tokenization import TitleTokens, part_behind_title, shared_tokens
from trainer.data.prompts.tokenization import TextTokens, Tokenizer
from trainer.data.reading.counter_rng import IntArray

_MIN_TITLE_TOKENS = 8  # before titles are cut further, the oldest item is dropped


class PromptWriter:
    """Writes the prompts of one catalog for one tokenizer.

    Args:
        titles: `titles[i - 1]` is the title of item i.
        max_title_tokens: most tokens per title, quotes included.
        max_tokens: most tokens per prompt, its answer included. Longer prompts lose title tokens first, then their
            oldest items, never a candidate, a slot, a read-out or the answer.
        choices: candidates per choice prompt; 0 if none are written.

    Raises:
        ValueError: `max_tokens` cannot hold a prompt with one item, or the tokenizer has no token that ends an answer.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        titles: Sequence[str],
        prompt_template: PromptTemplate,
        *,
        max_title_tokens: int,
        max_tokens: int,
        choices: int = 0,
    ) -> None:
        self._text = TextTokens(tokenizer)
        self._template = prompt_template
        self._max_tokens = max_tokens
        tails = {self._split_tail(words)[0] for words in prompt_template.behind_titles(choices > 0)}
        self._titles = TitleTokens(self._text, titles, prompt_template.title, sorted(tails), max_title_tokens)
        self.end_token = _end_token(tokenizer) if choices else -1
        # Answers reuse the titles' tokens if they are quoted alike and nothing is tokenised with what follows them.
        self._answers = self._titles
        if choices and (prompt_template.answer != prompt_template.title or "" not in tails):
            self._answers = TitleTokens(self._text, titles, prompt_template.answer, [""], max_title_tokens)
        self._check_boundaries()
        self._check_room(choices, max_title_tokens)

    @property
    def shows_user(self) -> bool:
        """Whether user prompts start with the user's vector."""
        return bool(self._template.user)

    @property
    def injects_user(self) -> bool:
        """Whether user prompts contain the user's vector."""
        return bool(self._template.user or self._template.user_closing)

    def user_prompt(self, item_L: IntArray, time_L: IntArray, vectors: int = 0) -> Prompt:
        """Prompt of a history, oldest item first, then the read-out token.

        Args:
            time_L: milliseconds since 1970 UTC.
            vectors: the first so many items are bare item vectors, without title and date; left out if the template
                has no item slots.
        """
        tail, ending = self._ending()
        draft = self._history(item_L, time_L, vectors, tail, [], len(ending.tokens))[0]
        draft.append(ending)
        return draft.prompt()

    def user_prompts(self, item_L: IntArray, time_L: IntArray, seen_W: IntArray, vectors: int = 0) -> list[Prompt]:
        """Prompts of the first `seen_W[w]` items for each w, ascending up to all items; one read-out each, in order.

        `vectors`, less than all of `seen_W`, is that of `user_prompt` in each of them.

        If everything fits, this is one prompt that branches before each target. What is cut from a prompt depends on
        everything that it shows, so if something has to be cut, there is one prompt per target.
        """
        tail, ending = self._ending()
        draft = self._history(item_L, time_L, vectors, tail, [], len(ending.tokens))[0]
        if len(seen_W) == 1 or not draft.whole:
            return [self.user_prompt(item_L[:seen], time_L[:seen], vectors) for seen in seen_W]
        between = self._behind_title(self._template.separator)[0]
        branches = []
        for seen in seen_W.tolist():
            # The same title may end in different tokens before the closing text and before a separator.
            item = item_L[seen - 1]
            last = self._titles.whole(item, tail)
            written = last if seen == len(item_L) else self._titles.whole(item, between)
            shared = shared_tokens(written, last)
            end = draft.ends[seen - vectors - 1]
            branches.append(_leaf(end - len(written) + shared, last[shared:], ending))
        return [replace(draft.prompt(), readout_R=_column([]), branches=tuple(branches))]

    def item_prompt(self, item: int) -> Prompt:
        """Prompt of an item: its title and vector, then the read-out token."""
        tail, closing = self._behind_title(self._template.item_closing)
        draft = _Draft(list(self._text.opening(self._template.item_opening)))
        room = self._max_tokens - len(draft.tokens) - len(closing) - 2  # the item's slot and the read-out
        self._write_title(draft, item, room, tail)
        draft.write(closing)
        draft.put(READOUT_SLOT)
        return draft.prompt()

    def choice_prompt(self, item_L: IntArray, time_L: IntArray, candidate_C: IntArray, vectors: int = 0) -> Prompt:
        """Prompt of a history and the candidate titles, in the order given; the answer follows the last token.

        `vectors` is that of `user_prompt`.
        """
        tail, choice = self._behind_title(self._template.choice)
        between, end = (
            self._behind_title(text) for text in (self._template.choice_separator, self._template.choice_end)
        )
        candidates = candidate_C.tolist()
        behind = [*[between] * (len(candidates) - 1), end]
        answer = max(len(self.answer(item)) for item in candidates)
        rest = len(choice) + sum(len(tokens) for _, tokens in behind) + answer
        titles = [self._titles.whole(item, mark) for item, (mark, _) in zip(candidates, behind, strict=True)]
        draft, cap = self._history(item_L, time_L, vectors, tail, titles, rest)
        draft.write(choice)
        for item, (mark, tokens) in zip(candidates, behind, strict=True):
            self._write_title(draft, item, cap, mark)
            draft.write(tokens)
        return draft.prompt()

    @property
    def longest_answer(self) -> int:
        """Number of tokens of the longest answer, its end token included."""
        return self._answers.longest_of_all() + 1

    def text(self, tokens: list[int]) -> str:
        """Decode the tokens of an answer."""
        return self._text.decode(tokens)

    def answer(self, item: int) -> list[int]:
        """Tokens of the answer to a choice prompt: the item's title, never cut to fit the prompt, and the end token."""
        return [*self._answers.whole(item), self.end_token]

    def _ending(self) -> tuple[str, _Draft]:
        """Tail of the last title, and the rest of a user prompt: text, the user's vector if there, the read-out."""
        words, ending = self._template, _Draft([])
        tail, first = self._behind_title(words.user_closing or words.closing)
        ending.write(first)
        if words.user_closing:
            ending.put(USER_SLOT)
            ending.write(self._text.inside(words.closing))
        ending.put(READOUT_SLOT)
        return tail, ending

    def _split_tail(self, text: str) -> tuple[str, str]:
        """Split the text after a title or its slot into the title's tail and the rest."""
        return ("", text) if self._template.item_slots else part_behind_title(text)

    def _behind_title(self, text: str) -> tuple[str, list[int]]:
        """Tail that this text adds to the title before it, and the tokens of the rest."""
        tail, rest = self._split_tail(text)
        return tail, self._text.inside(rest) if rest else []

    def _history(
        self, item_L: IntArray, time_L: IntArray, vectors: int, tail: str, others: Sequence[list[int]], rest: int
    ) -> tuple[_Draft, int]:
        """Draft of a prompt up to its last history item, and the number of tokens to which its titles are cut.

        Args:
            vectors: the first so many items are bare item vectors.
            tail: punctuation after the last title.
            others: later titles of the prompt, which may be cut too.
            rest: later tokens of the prompt besides those titles and their slots.

        Raises:
            ValueError: the history is empty.
        """
        between = self._split_tail(self._template.separator)[0]
        slot = int(self._template.item_slots)
        bare = item_L[:vectors].tolist() if slot else []
        item_L, time_L = item_L[vectors:], time_L[vectors:]
        if not len(item_L):
            raise ValueError("a user prompt needs at least one item of history")
        draft = self._start()
        first, all_bare = 0, len(bare)
        # Drop the oldest items until each title keeps enough tokens; the latest item is always shown.
        while True:
            shown, heads = item_L[first:].tolist(), self._heads(time_L[first:], bool(bare))
            earlier = self._before_vectors() if bare else []
            tails = [*[between] * (len(shown) - 1), tail]
            titles = [self._titles.whole(item, mark) for item, mark in zip(shown, tails, strict=True)]
            lengths = [len(title) for title in (*titles, *others)]
            fixed = len(draft.tokens) + len(earlier) + len(bare) + sum(map(len, heads)) + slot * len(lengths) + rest
            missing = sum(min(length, _MIN_TITLE_TOKENS) for length in lengths) - (self._max_tokens - fixed)
            if missing <= 0 or (not bare and first == len(item_L) - 1):
                break
            if bare:
                bare = bare[missing:]
            else:
                first += 1
        cap = _largest_cap(lengths, self._max_tokens - fixed)
        draft.whole = first == 0 and len(bare) == all_bare and cap >= max(lengths)
        draft.write(earlier)
        for item in bare:
            draft.put(item)
        for head, item, mark in zip(heads, shown, tails, strict=True):
            draft.write(head)
            self._write_title(draft, item, cap, mark)
            draft.ends.append(len(draft.tokens))
        return draft, cap

    def _start(self) -> _Draft:
        """Draft of a prompt before its history: empty, or the user's vector."""
        draft = _Draft([])
        if self._template.user:
            draft.write(self._text.opening(self._template.user))
            draft.put(USER_SLOT)
        return draft

    def _before_vectors(self) -> list[int]:
        """Tokens between the start of a prompt and its first bare item vector."""
        words = self._template
        return (self._text.inside if words.user else self._text.opening)(words.opening + words.earlier[0])

    def _write_title(self, draft: _Draft, item: int, cap: int, tail: str) -> None:
        """Write a title in at most `cap` tokens, and its slot."""
        draft.write(self._titles.cut(item, tail, cap))
        if self._template.item_slots:
            draft.put(item)

    def _heads(self, time_L: IntArray, behind_vectors: bool) -> list[list[int]]:
        """Tokens before each title, from the slot or the tail before it on; dates are UTC."""
        opening = self._template.earlier[1] if behind_vectors else self._template.opening
        separator = self._split_tail(self._template.separator)[1]
        heads = []
        for number, day in enumerate(
            np.asarray(time_L).astype("datetime64[ms]").astype("datetime64[D]").astype(str), 1
        ):
            line = self._template.line.format(number=number, date=day.replace("-", self._template.date_separator))
            before = separator if number > 1 else opening
            first = number == 1 and not self._template.user and not behind_vectors
            heads.append((self._text.opening if first else self._text.inside)(before + line))
        return heads

    def _check_boundaries(self) -> None:
        """Raise ValueError if the tokenizer merges across the boundaries between titles and template text."""
        words = self._template
        first = words.opening + words.line.format(number=1, date="2000-01-01")
        for before in (first, words.item_opening):
            self._text.check_boundary(before, "a".join(words.title))
        closing = words.user_closing or words.closing
        for text in (words.separator + words.line.format(number=2, date="2000-01-01"), closing):
            tail, rest = self._split_tail(text)
            if tail and rest:
                self._text.check_boundary("a".join(words.title) + tail, rest)

    def _check_room(self, choices: int, longest_title: int) -> None:
        """Raise ValueError if `max_tokens` cannot hold the shortest prompt, its titles cut and its answer whole."""
        words = self._template
        texts = [words.user, words.opening + words.line.format(number=1, date="2000-01-01")]
        if choices:
            what = f"one item and {choices} candidates"
            behind = [words.choice, words.choice_end, *[words.choice_separator] * (choices - 1)]
            rest = longest_title + 1
        else:
            what = "one item"
            behind = []
            rest = len(self._ending()[1].tokens)
        opening, *inside = [text for text in texts if text]
        needed = len(self._text.opening(opening)) + sum(len(self._text.inside(text)) for text in inside) + rest
        needed += sum(len(self._behind_title(text)[1]) for text in behind)
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
    """Number of tokens up to the end of each titled history item."""
    whole: bool = True
    """Whether all items are shown and no title was cut to fit."""

    def write(self, tokens: list[int]) -> None:
        self.tokens += tokens

    def put(self, item: int) -> None:
        """Append a slot for an item id, `USER_SLOT` or `READOUT_SLOT`."""
        self.slots.append(len(self.tokens))
        self.items.append(item)
        self.tokens.append(0)  # a placeholder: its embedding is replaced

    def append(self, ending: _Draft) -> None:
        """Append the tokens and slots of another draft."""
        self.slots += [len(self.tokens) + slot for slot in ending.slots]
        self.items += ending.items
        self.tokens += ending.tokens

    def prompt(self) -> Prompt:
        """The finished prompt, read out at its last token."""
        readout = [len(self.tokens) - 1]
        return Prompt(_column(self.tokens), _column(self.slots), _column(self.items), _column(readout))


def _column(values: list[int]) -> IntArray:
    return np.array(values, np.int64)


def _leaf(after: int, token_T: list[int], ending: _Draft) -> Branch:
    """A branch of `token_T` and the ending of a user prompt."""
    draft = _Draft(list(token_T))
    draft.append(ending)
    found = draft.prompt()
    return Branch(after, found.token_T, found.slot_S, found.item_S, found.readout_R)


def _end_token(tokenizer: Tokenizer) -> int:
    """The tokenizer's EOS token, which ends an answer."""
    end: int | None = getattr(tokenizer, "eos_token_id", None)
    if end is None:
        raise ValueError("the tokenizer has no end-of-sequence token to end an answer with: set eos_token in its files")
    return end


def _largest_cap(lengths: list[int], budget: int) -> int:
    """The largest c such that titles cut to c tokens fit into `budget`; at least the longest title if all fit uncut."""
    if sum(lengths) <= budget:
        return max([*lengths, _MIN_TITLE_TOKENS])
    cap = 0
    while sum(min(length, cap + 1) for length in lengths) <= budget:
        cap += 1
    return cap
