"""Lines of files that anyone may have written: ids, and histories as JSON; torch-free."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from shards.manifest import parse_json
from trainer.data.raw.history import History, HistoryError

STDIN = Path("-")
"""Stands for standard input."""
_USERS, _ITEMS, _TIMES = ("user_id", "user"), ("history", "items"), ("times",)


def read_lines(path: Path, what: str) -> list[str]:
    """The lines of a text file, or of standard input for `-`, without surrounding space and without empty ones.

    Args:
        what: what a line holds, for messages: "user ids".

    Raises:
        ValueError: there is no such file, it is not text, or it has no line.
    """
    lines = [line for _, line in _numbered_lines(path)]
    if not lines:
        raise ValueError(f"{_name(path)} has no {what}: write one per line")
    return lines


def read_history_lines(path: Path) -> list[History]:
    """Histories in JSON lines, from a file or from standard input for `-`.

    A line is a list of ids or titles, oldest first, or `{"history": [...], "times": [...], "user_id": "..."}`, of which
    only `history` has to be there. Numbers count as ids.

    Raises:
        HistoryError: a line is not such a history; the message has its number.
        ValueError: there is no such file, it is not text, or it has no line.
    """
    histories = []
    for number, line in _numbered_lines(path):
        try:
            histories.append(_history(parse_json(line)))
        except (HistoryError, ValueError) as error:
            raise HistoryError(f"{_name(path)}, line {number}: {error}") from None
    if not histories:
        raise HistoryError(f'{_name(path)} has no history: write one per line, such as ["id or title", "id or title"]')
    return histories


def _history(value: Any) -> History:
    if isinstance(value, list):
        return History(_texts(value))
    if not isinstance(value, Mapping):
        raise HistoryError('a history is a list of items, or {"history": [...]}')
    if other := sorted(set(value) - {*_USERS, *_ITEMS, *_TIMES}):
        raise HistoryError(f"unknown key {str(other[0])[:80]!r} (known: history, times, user_id)")
    items, times, user = (next((value[key] for key in keys if key in value), None) for keys in (_ITEMS, _TIMES, _USERS))
    if not isinstance(items, list):
        raise HistoryError('"history" has to be a list of ids or titles')
    if times is not None and not isinstance(times, list):
        raise HistoryError('"times" has to be a list, one time per item')
    return History(_texts(items), times, None if user is None else _text(user))


def _texts(values: list[Any]) -> list[str]:
    return [_text(value) for value in values]


def _text(value: Any) -> str:
    """An id or title; numbers, which many systems use as ids, become text."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise HistoryError(f"{str(value)[:80]!r} is neither an id nor a title")
    return str(value)


def _numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        text = sys.stdin.buffer.read() if path == STDIN else path.read_bytes()
        lines = text.decode("utf-8-sig").split("\n")  # not `splitlines`: a title may hold other line separators
    except UnicodeDecodeError as error:
        raise ValueError(f"{_name(path)} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: fix the path, or write - for standard input") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield number, line.strip()


def _name(path: Path) -> str:
    return "standard input" if path == STDIN else str(path)
