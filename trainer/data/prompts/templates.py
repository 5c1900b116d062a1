"""Prompt templates: the text of Tables 1 and 2 of the LLM-SRec paper, and the strings of its official code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

Style = Literal["code", "paper"]


@dataclass(frozen=True)
class PromptTemplate:
    """Fixed text around the titles and slots of a system's prompts."""

    opening: str
    line: str
    """Before the title of each history item; `{number}` counts from 1, `{date}` is a UTC date."""
    date_separator: str
    separator: str
    """Between two history items."""
    title: tuple[str, str]
    """Text before (a space included) and after a title."""
    closing: str
    """After the history, before the read-out (retrieval)."""
    item_opening: str
    """Before the title of an item prompt."""
    item_closing: str
    """After the title of an item prompt and its slot, before the read-out."""
    choice: str
    """After the history, before the candidate titles (generation)."""
    answer: tuple[str, str]
    """Text before and after the title in an answer (generation)."""
    user: str = ""
    """Before the user's vector at the start of a prompt; empty if prompts have none there."""
    user_closing: str = ""
    """After the history, before the user's vector, which `closing` follows; empty if prompts have none there."""
    item_slots: bool = True
    """Whether an item's vector follows its title."""
    earlier: tuple[str, str] = ("the earlier items", ", and the latest items ")
    """Around the bare item vectors that precede the titled items; the first part follows `opening`."""
    choice_separator: str = ","
    """Between two candidate titles (generation)."""
    choice_end: str = "."
    """After the last candidate title (generation)."""

    def behind_titles(self, choices: bool) -> tuple[str, ...]:
        """Texts that may follow a title or its slot; `choices`: those of choice prompts too."""
        behind = (self.separator, self.user_closing or self.closing, self.item_closing)
        return (*behind, self.choice, self.choice_separator, self.choice_end) if choices else behind


def prompt_template(style: Style, *, item_slots: bool, user_vector: bool | Literal["end"]) -> PromptTemplate:
    """Template of a system by what its prompts inject: TALLRec nothing, LLaRA item vectors, CoLLM also user vectors."""
    text = _BOTH[style]
    if not item_slots:
        text = replace(text, **_TITLES_ALONE[style])
    if user_vector == "end":
        # Short, since each target of a window has its own; the read-out directly follows the vector.
        end = text.closing.removesuffix(_TOKEN)
        text = replace(text, user_closing=f"{end}User representation:", closing="")
    elif user_vector:
        text = replace(
            text,
            user="This is user representation from recommendation models:",
            opening=text.opening.replace("This user", ", and this user"),
            closing=text.closing.replace("of purchases,", "of purchases and user representation,"),
        )
    return text


_ORDER = "This user has made a series of purchases in the following order: "
_TOKEN = "Based on this sequence of purchases, generate user representation token:"
_CHOOSE = 'Choose one "Title" to recommend for this user to buy next from the following item "Title" set:'

_BOTH: Mapping[Style, PromptTemplate] = {
    # The strings of the official code. A line ends before the space, which is tokenised with the title.
    "code": PromptTemplate(
        opening=_ORDER,
        line="Item No.{number}, Time: {date},",
        date_separator="-",
        separator=",",
        title=(' "', '"'),
        closing=f". {_TOKEN}",
        item_opening="The item title and item embedding are as follows:",
        item_closing=", then generate item representation token:",
        choice=f". {_CHOOSE}",
        answer=(' "', '"'),
    ),
    # The paper's brackets mark the repeated element and are not part of the text.
    "paper": PromptTemplate(
        opening=f"{_ORDER}(History Item List: ",
        line="No.{number} Time: {date} Title:",
        date_separator="/",
        separator=", ",
        title=(" ", ","),
        closing=f"). {_TOKEN}",
        item_opening='The item title and item embedding are as follows: "Title":',
        item_closing=", then generate item representation token:",
        choice=f"). {_CHOOSE}",
        answer=(" ", ""),
    ),
}

_TITLES_ALONE: Mapping[Style, Mapping[str, Any]] = {
    "code": {"item_slots": False, "item_opening": "The item title is as follows:"},
    # The comma after a title goes with the item vector, and so is left out here.
    "paper": {"item_slots": False, "item_opening": 'The item title is as follows: "Title":', "title": (" ", "")},
}
