"""The fixed text of the prompts: Tables 1 and 2 of the LLM-SRec paper, and the strings of its official code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

Style = Literal["code", "paper"]


@dataclass(frozen=True)
class PromptTemplate:
    """What stands around the titles and slots of a system's prompts."""

    opening: str
    line: str
    """Before the title of one history item; `{number}` counts from 1 and `{date}` is a UTC date."""
    date_separator: str
    separator: str
    """Between two history lines."""
    title: tuple[str, str]
    """What stands before (a space included) and after a title."""
    closing: str
    item_opening: str
    item_closing: str
    choice: str
    """After the history, before the candidate titles (generation)."""
    answer: tuple[str, str]
    """What stands before and after the title that answers (generation)."""
    user: str = ""
    """Before the user's vector at the head of a prompt; empty where there is none."""
    item_slots: bool = True
    """Whether an item's vector follows its title."""
    choice_separator: str = ","
    choice_end: str = "."

    def behind_titles(self, choices: bool) -> tuple[str, ...]:
        """The texts that may follow a title or its slot."""
        behind = (self.separator, self.closing, self.item_closing)
        return (*behind, self.choice, self.choice_separator, self.choice_end) if choices else behind


def prompt_template(style: Style, *, item_slots: bool, user_vector: bool) -> PromptTemplate:
    """The text for a system, by what its prompts hold: TALLRec neither, LLaRA item vectors, CoLLM both."""
    text = _BOTH[style]
    if not item_slots:
        text = replace(text, **_TITLES_ALONE[style])
    if user_vector:
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
    # The strings of the official code. A line ends before the space, which belongs to the title's tokens.
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
    # The paper's brackets stand for the repeated element and are not text.
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
    # The comma after a title belongs to the vector that follows it.
    "paper": {"item_slots": False, "item_opening": 'The item title is as follows: "Title":', "title": (" ", "")},
}
