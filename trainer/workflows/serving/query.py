"""A request for recommendations, as anyone may have written it."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, StrictInt

_LONGEST = 500
"""Characters of an id, a title, a time or a name."""

_SURROGATE = re.compile("[\ud800-\udfff]")
"""JSON can write what no text has; no answer could repeat it."""


def _text(value: Any) -> Any:
    """Ids are numbers in many systems."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError("it is neither an id nor a title")
    text = str(value)
    if not 0 < len(text) <= _LONGEST:
        raise ValueError(f"it has {len(text)} characters: give 1 to {_LONGEST}")
    if not text.isascii() and _SURROGATE.search(text):
        raise ValueError("it is not text: half of a surrogate pair is in it")
    return text


def _moment(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError("it is not a time")
    return value


Item = Annotated[str, BeforeValidator(_text)]
Moment = Annotated[str | int | float, BeforeValidator(_moment)]


class Query(BaseModel):
    """A history to recommend after."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    history: Annotated[list[Item], Field(min_length=1)]
    """Raw item ids or titles, oldest first."""
    times: list[Moment] | None = None
    """Time of each item: a date, ISO text, or seconds since 1970."""
    k: Annotated[StrictInt, Field(ge=1, lt=2**31)] = 10
    """Items to recommend."""
    exclude_seen: StrictBool = True
    """Leave out the items of the history."""
    unknown: Literal["error", "skip"] = "error"
    """What becomes of items that the catalog does not have."""
    user_id: Item | None = None
    """Name that the answer carries."""
