"""Histories as people give them: raw item ids or titles, oldest first, with or without times; torch-free."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Literal

import numpy as np

from trainer.data.raw.items import RawItems, UnknownItemError
from trainer.data.reading.histories import Histories

Time = int | float | str | date
"""A point in time: a date, ISO text such as `2024-05-31` or `2024-05-31T18:00` (UTC unless it says otherwise), or the
number of seconds since 1970 UTC; numbers from 10^11 on are milliseconds."""
Unknown = Literal["error", "skip", "read"]
"""What becomes of an item that is not in the catalog: an error, left out, or read by its title alone."""

_SECONDS_BELOW = 1e11
"""Numbers below it are seconds (up to the year 5138), others milliseconds (from March 1973 on)."""
_LATEST = datetime(9999, 12, 31, tzinfo=UTC).timestamp() * 1000


class HistoryError(ValueError):
    """A history that cannot be read; the message says which one, and the cure."""


@dataclass(frozen=True)
class History:
    """What someone has seen, read or bought."""

    items: Sequence[str]
    """Raw item ids or titles, oldest first. An item may occur several times."""
    times: Sequence[Time] | None = None
    """Time of each item, by which items are then sorted; None: none is known."""
    user_id: str | None = None
    """Name that the answer carries; it need not be a user of the dataset."""


@dataclass(frozen=True)
class ReadHistories:
    """Histories in the numbers of a catalog."""

    histories: Histories
    """Rows are users 0, 1, ...; items above the catalog's are those of `new_titles`."""
    user_ids: tuple[str | None, ...]
    new_titles: tuple[str, ...]
    """Titles that are not in the catalog: item N + 1, N + 2, ..."""
    skipped: int
    """Items that were left out because the catalog does not have them."""


def read_histories(
    given: Sequence[History | Sequence[str]], items: RawItems, *, unknown: Unknown = "error", default_time: int = 0
) -> ReadHistories:
    """Find the items of histories in a catalog.

    Args:
        given: a list of ids or titles stands for a history without times.
        default_time: time of all events of a history without times, in milliseconds since 1970 UTC.

    Raises:
        HistoryError: a history is empty, names an unknown item, or has times that are not times; the message is about
            the first such history, and counts the others.
    """
    reader = _Reader(items, unknown)
    rows, problems = [], []
    for number, history in enumerate(given, 1):
        try:
            rows.append(reader.row(history, default_time))
        except (HistoryError, UnknownItemError) as error:
            problems.append(f"history {number}{_named(history)}: {error}" if len(given) > 1 else str(error))
    if problems:
        more = f" (and {len(problems) - 1} more of the {len(given)} histories)" if len(problems) > 1 else ""
        raise HistoryError(problems[0] + more)
    if not rows:
        raise HistoryError("no history was given")
    length = [len(item_L) for item_L, _ in rows]
    return ReadHistories(
        Histories(
            np.arange(len(rows)),
            np.concatenate([[0], np.cumsum(length)]).astype(np.int64),
            np.concatenate([item_L for item_L, _ in rows]),
            np.concatenate([time_L for _, time_L in rows]),
        ),
        tuple(history.user_id if isinstance(history, History) else None for history in given),
        tuple(reader.new_titles),
        reader.skipped,
    )


class _Reader:
    def __init__(self, items: RawItems, unknown: Unknown) -> None:
        self._items, self._unknown = items, unknown
        self.new_titles: dict[str, int] = {}
        self.skipped = 0

    def row(self, given: History | Sequence[str], default_time: int) -> tuple[np.ndarray, np.ndarray]:
        """(L,) items and (L,) times of one history."""
        history = given if isinstance(given, History) else History(given)
        if isinstance(history.items, str):
            raise HistoryError(f"a history is a list of items, not the text {history.items[:80]!r}: put it in a list")
        if not len(history.items):
            raise HistoryError("it is empty: give at least one item")
        if history.times is not None and len(history.times) != len(history.items):
            raise HistoryError(f"it has {len(history.items)} items, but {len(history.times)} times: give one per item")
        found = [self._item(text) for text in history.items]
        times = [default_time] * len(found) if history.times is None else [milliseconds(t) for t in history.times]
        kept = [(item, time) for item, time in zip(found, times, strict=True) if item is not None]
        self.skipped += len(found) - len(kept)
        if not kept:
            raise HistoryError(f"none of its {len(found)} items is in {self._items.source}: give at least one that is")
        item_L, time_L = (np.array(column, np.int64) for column in zip(*kept, strict=True))
        order = np.argsort(time_L, kind="stable")
        return item_L[order], time_L[order]

    def _item(self, text: object) -> int | None:
        if not isinstance(text, str):
            raise HistoryError(f"item {text!r:.80} is a {type(text).__name__}: give ids and titles as text")
        if (item := self._items.find(text)) is not None or self._unknown == "skip":
            return item
        if self._unknown == "read" and text.strip():
            return self.new_titles.setdefault(text, len(self._items) + len(self.new_titles) + 1)
        raise UnknownItemError(self._items.unknown(text))


def milliseconds(time: Time) -> int:
    """A time in milliseconds since 1970 UTC.

    Raises:
        HistoryError: it is not a time.
    """
    try:
        found = _milliseconds(time)
    except (ValueError, OverflowError):
        found = math.nan
    if not abs(found) <= _LATEST:
        raise HistoryError(
            f"{time!r:.80} is not a time: write 2024-05-31, 2024-05-31T18:00, or seconds or milliseconds since 1970"
        )
    return round(found)


def _milliseconds(time: object) -> float:
    match time:
        case bool():
            return math.nan
        case int() | float():
            return float(time) * (1000 if abs(time) < _SECONDS_BELOW else 1)
        case datetime():
            return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp() * 1000
        case date():
            return _milliseconds(datetime(time.year, time.month, time.day))
        case str():
            number = _number(time)
            return _milliseconds(datetime.fromisoformat(time.strip()) if number is None else number)
        case _:
            return math.nan


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _named(history: History | Sequence[str]) -> str:
    return f" (user {history.user_id[:80]!r})" if isinstance(history, History) and history.user_id else ""
