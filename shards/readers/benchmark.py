"""RecBole's benchmark files: each row is a history (`item_id_list`) and the item that follows, in files by split.

A history is what precedes a row's item, so most events of a user are in one list. Training rows may be the growing
beginnings of one history (data augmentation). Only the last item of a row has a time.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import polars as pl

from shards.formats.tables import table_columns, table_frames
from shards.manifest import DatasetError
from shards.readers.ids import as_ids
from shards.readers.sources import Columns, Source
from shards.readers.times import time_unit, to_ms


@dataclass
class _User:
    """A user's sequence as far as it is known: items with their split, and times of those that ended a row."""

    items: list[str] = field(default_factory=list)
    splits: list[str] = field(default_factory=list)
    times: dict[int, int] = field(default_factory=dict)


def list_column(path: Path, columns: Columns, source: Source) -> str | None:
    """The column with the histories, RecBole's suffix `_list` behind the item column; None without one."""
    name = f"{columns.item or source.item[0]}_list"
    return name if name in table_columns(path, [name], replace(columns.layout, typed=True)) else None


def history_events(
    by_split: Sequence[tuple[str | None, Path]], columns: Columns, source: Source, counts: Counter[str]
) -> Iterator[pl.DataFrame]:
    """One frame (user, item, time in ms, split) of the events of all rows, each once.

    An item without a time gets the next one that its user has, less 1 ms for each step to it, which keeps the order.

    Args:
        by_split: the files, train before valid before test.
        counts: gets the number of such times.

    Raises:
        DatasetError: a file without histories, or rows of a user that do not continue one sequence.
    """
    users: dict[str, _User] = defaultdict(_User)
    for split, path in by_split:
        assert split is not None
        rows = pl.concat(list(_rows(path, columns, source)))
        # Short histories first, so that every row continues what is known.
        for user, history, item, time in sorted(rows.iter_rows(), key=lambda row: len(row[1])):
            if user is None or item is None:
                raise DatasetError(f"{path} has a row without a user or item id: remove it")
            _add(users[user], split, history, item, time, f"{path}: user {user!r}")
    order = ["train", "valid", "test"]
    records = []
    for name, user in users.items():
        time = 0
        for place in reversed(range(len(user.items))):
            if place in user.times:
                time = user.times[place]
            else:
                time -= 1
                counts["times_from_the_next_event"] += 1
            records.append((name, user.items[place], time, order.index(user.splits[place])))
    schema = {"user": pl.String, "item": pl.String, "time": pl.Int64, "split": pl.UInt8}
    yield pl.DataFrame(records, schema=schema, orient="row")


def _rows(path: Path, columns: Columns, source: Source) -> Iterator[pl.DataFrame]:
    """Frames of user, history (a list of ids), item and time (ms)."""
    lists = list_column(path, columns, source)
    if lists is None:
        raise DatasetError(f"{path} has no histories, but other files have: give files of one kind")
    user, item = columns.user or source.user[0], columns.item or source.item[0]
    time = columns.time or source.time[0]
    layout = replace(columns.layout, typed=True)
    unit: str | None = None
    for number, frame in enumerate(
        table_frames(path, {user: "user", lists: "history", item: "item", time: "time"}, layout)
    ):
        if number == 0:
            unit = time_unit(frame["time"], columns.time_unit, source.unit, path)
        ids = [as_ids(frame[name], path, Counter()) for name in ("user", "item")]
        history = frame["history"].fill_null("").str.split(" ").list.eval(pl.element().filter(pl.element() != ""))
        yield pl.DataFrame([ids[0], history, ids[1], to_ms(frame["time"], unit, path)])


def _add(user: _User, split: str, history: list[str], item: str, time: int, where: str) -> None:
    """Add a row: its history must be what is known of the user, or its last part if RecBole cut it."""
    known = user.items
    if split == "train" and history == known[: len(history)] and len(known) > len(history):
        if known[len(history)] != item:
            raise _not_one(where)
        user.times.setdefault(len(history), time)
        return
    if history[: len(known)] == known and set(user.splits) <= {"train"}:
        # Events that only the history has come before what the row is for.
        user.items += history[len(known) :]
        user.splits += ["train"] * (len(history) - len(user.splits))
    elif not history or known[-len(history) :] != history:
        raise _not_one(where)
    user.times[len(user.items)] = time
    user.items.append(item)
    user.splits.append(split)


def _not_one(where: str) -> DatasetError:
    return DatasetError(
        f"{where} has rows whose histories do not continue one another, as sessions do: give the events themselves "
        "(a file without item_id_list), or one user id per session"
    )
