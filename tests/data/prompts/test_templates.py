"""Prompts of every system, character for character (Tables 1 and 2 of the paper)."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_helpers import ints

from trainer.data.prompts.prompt import READOUT_SLOT, USER_SLOT, Prompt
from trainer.data.prompts.templates import Style, prompt_template
from trainer.data.prompts.writer import PromptWriter

MARCH_2 = 16_496 * 86_400_000  # 2015-03-02

TALLREC, LLARA, COLLM = (False, False), (True, False), (True, True)
"""Item slots, user vector; LLM-SRec is worded as LLaRA, A-LLMRec as CoLLM."""

USER_PROMPTS: dict[tuple[Style, tuple[bool, bool]], str] = {
    ("code", TALLREC): (
        "This user has made a series of purchases in the following order: "
        'Item No.1, Time: 2015-03-02, "title A",Item No.2, Time: 2015-03-03, "B!"'
        ". Based on this sequence of purchases, generate user representation token:[Out]"
    ),
    ("code", LLARA): (
        "This user has made a series of purchases in the following order: "
        'Item No.1, Time: 2015-03-02, "title A"[1],Item No.2, Time: 2015-03-03, "B!"[2]'
        ". Based on this sequence of purchases, generate user representation token:[Out]"
    ),
    ("code", COLLM): (
        "This is user representation from recommendation models:[User], and this user has made a series of purchases "
        'in the following order: Item No.1, Time: 2015-03-02, "title A"[1],Item No.2, Time: 2015-03-03, "B!"[2]'
        ". Based on this sequence of purchases and user representation, generate user representation token:[Out]"
    ),
    ("paper", TALLREC): (
        "This user has made a series of purchases in the following order: "
        "(History Item List: No.1 Time: 2015/03/02 Title: title A, No.2 Time: 2015/03/03 Title: B!"
        "). Based on this sequence of purchases, generate user representation token:[Out]"
    ),
    ("paper", LLARA): (
        "This user has made a series of purchases in the following order: "
        "(History Item List: No.1 Time: 2015/03/02 Title: title A,[1], No.2 Time: 2015/03/03 Title: B!,[2]"
        "). Based on this sequence of purchases, generate user representation token:[Out]"
    ),
    ("paper", COLLM): (
        "This is user representation from recommendation models:[User], and this user has made a series of purchases "
        "in the following order: "
        "(History Item List: No.1 Time: 2015/03/02 Title: title A,[1], No.2 Time: 2015/03/03 Title: B!,[2]"
        "). Based on this sequence of purchases and user representation, generate user representation token:[Out]"
    ),
}

ITEM_PROMPTS: dict[tuple[Style, tuple[bool, bool]], str] = {
    ("code", TALLREC): 'The item title is as follows: "B!", then generate item representation token:[Out]',
    ("code", LLARA): (
        'The item title and item embedding are as follows: "B!"[2], then generate item representation token:[Out]'
    ),
    ("paper", TALLREC): 'The item title is as follows: "Title": B!, then generate item representation token:[Out]',
    ("paper", LLARA): (
        'The item title and item embedding are as follows: "Title": B!,[2]'
        ", then generate item representation token:[Out]"
    ),
}
ITEM_PROMPTS |= {(style, COLLM): ITEM_PROMPTS[style, LLARA] for style in ("code", "paper")}

CHOICES: dict[tuple[Style, tuple[bool, bool]], str] = {
    ("code", TALLREC): '"Title" set: "B!", "c", "title A".',
    ("code", LLARA): '"Title" set: "B!"[2], "c"[3], "title A"[1].',
    ("paper", TALLREC): '"Title" set: B!, c, title A.',
    ("paper", LLARA): '"Title" set: B!,[2], c,[3], title A,[1].',
}
CHOICES |= {(style, COLLM): CHOICES[style, LLARA] for style in ("code", "paper")}
ASKED = 'Choose one "Title" to recommend for this user to buy next from the following item '
ANSWERS: dict[Style, str] = {"code": ' "title A"<|eot_id|>', "paper": " title A<|eot_id|>"}

every_text = pytest.mark.parametrize("kind", [TALLREC, LLARA, COLLM], ids=["tallrec", "llara", "collm"])
every_style = pytest.mark.parametrize("style", ["code", "paper"])


@pytest.fixture(scope="module")
def tokenizer(tiny_llm: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_llm)


def writer(tokenizer: Any, style: Style, kind: tuple[bool, bool], **settings: int) -> PromptWriter:
    words = prompt_template(style, item_slots=kind[0], user_vector=kind[1])
    settings = {"max_title_tokens": 64, "max_tokens": 1024, "choices": 3} | settings
    return PromptWriter(tokenizer, ["title A", "B!", "c"], words, **settings)


def shown(tokenizer: Any, prompt: Prompt) -> str:
    """The prompt as text, with the contents of its slots in brackets."""
    names = {USER_SLOT: "[User]", READOUT_SLOT: "[Out]"}
    text = ""
    for (before, after), item in zip(pairwise([-1, *prompt.slot_S.tolist()]), prompt.item_S.tolist(), strict=True):
        text += tokenizer.decode(prompt.token_T[before + 1 : after]) + names.get(item, f"[{item}]")
    rest = prompt.token_T[prompt.slot_S[-1] + 1 if len(prompt.slot_S) else 0 :]
    return f"{text}{tokenizer.decode(rest)}"


def days(count: int) -> Any:
    return MARCH_2 + 86_400_000 * np.arange(count)


@every_style
@every_text
def test_retrieval(tokenizer: Any, style: Style, kind: tuple[bool, bool]) -> None:
    some = writer(tokenizer, style, kind)
    prompt = some.user_prompt(ints([1, 2]), days(2))
    assert shown(tokenizer, prompt) == USER_PROMPTS[style, kind]
    assert shown(tokenizer, some.item_prompt(2)) == ITEM_PROMPTS[style, kind]
    assert prompt.readout_R.tolist() == [len(prompt.token_T) - 1]


@every_style
@every_text
def test_generation(tokenizer: Any, style: Style, kind: tuple[bool, bool]) -> None:
    some = writer(tokenizer, style, kind)
    prompt = some.choice_prompt(ints([1, 2]), days(2), ints([2, 3, 1]))
    history = USER_PROMPTS[style, kind].split(" Based on")[0]
    assert shown(tokenizer, prompt) == f"{history} {ASKED}{CHOICES[style, kind]}"
    assert prompt.readout_R.tolist() == [len(prompt.token_T) - 1], "the last token predicts the answer's first"
    assert tokenizer.decode(some.answer(1)) == ANSWERS[style]


def test_the_answer_is_written_as_in_the_list(tokenizer: Any) -> None:
    """A model that copies a title from the list produces exactly the answer's tokens."""
    some = writer(tokenizer, "code", TALLREC)
    title, end = some.answer(1)[:-1], some.answer(1)[-1]
    assert end == tokenizer.eos_token_id
    prompt = some.choice_prompt(ints([2]), days(1), ints([1, 2, 3])).token_T.tolist()
    assert any(prompt[first : first + len(title)] == title for first in range(len(prompt)))


@every_style
@every_text
def test_candidates_and_answer_stay_when_titles_and_items_go(
    tokenizer: Any, style: Style, kind: tuple[bool, bool]
) -> None:
    titles = [" ".join(f"{letter}{n}" for n in range(30)) for letter in "abcde"]
    words = prompt_template(style, item_slots=kind[0], user_vector=kind[1])

    def made(row: int) -> tuple[Prompt, int]:
        some = PromptWriter(tokenizer, titles, words, max_title_tokens=24, max_tokens=row, choices=4)
        return some.choice_prompt(ints([1, 2, 3, 4]), days(4), ints([5, 4, 3, 2])), len(some.answer(5))

    with pytest.raises(ValueError, match="one item and 4 candidates: set at least") as caught:
        made(64)
    smallest = int(str(caught.value).split()[-1])
    lengths, numbers = set(), set()
    for row in range(smallest, smallest + 420, 10):
        prompt, answer = made(row)
        assert answer == 25, "an answer is never cut to fit a row"
        assert len(prompt.token_T) + answer <= row
        text = shown(tokenizer, prompt)
        assert text.count("[5]") == kind[0], "candidates keep their slots"
        assert text.count("[User]") == kind[1]
        choices = text.split("set:")[1]
        assert [choices.count(f"{letter}0 ") for letter in "abcde"] == [0, 1, 1, 1, 1]
        numbers.add(text.count("No."))
        lengths.add(len(prompt.token_T))
    assert {1, 4} <= numbers
    assert len(lengths) > 5
