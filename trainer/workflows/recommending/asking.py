"""Who is to get recommendations: users of the dataset, or given histories. Refusals are torch-free.

Letters: U histories, E events.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from trainer.config import ConfigError, reads_titles_alone
from trainer.data.raw.history import History, HistoryError, Unknown, read_histories
from trainer.data.raw.items import RawItems, UnknownItemError
from trainer.data.reading.counter_rng import IntArray
from trainer.data.reading.histories import Histories
from trainer.runs.preflight import SavedRun

_GROUP = 4
"""Shards read at a time when all users are asked for."""


@dataclass(frozen=True)
class Asked:
    """Histories to recommend after."""

    histories: Histories
    user_ids: Sequence[str | None]
    dated_U: Sequence[bool]
    """Whether the times of each history are known."""
    new_titles: tuple[str, ...] = ()
    """Titles of items N + 1, N + 2, ... of the histories."""
    skipped: int = 0
    """Items that were left out of the histories because the catalog does not have them."""

    def __len__(self) -> int:
        return len(self.histories)

    def take(self, rows: slice) -> Asked:
        """Some of the histories."""
        return replace(
            self, histories=self.histories.take(rows), user_ids=self.user_ids[rows], dated_U=self.dated_U[rows]
        )

    def at(self, time: int) -> Asked:
        """Give events whose time is not known this one, in milliseconds since 1970 UTC."""
        dated_E = np.repeat(np.array(self.dated_U, bool), self.histories.length_U)
        return replace(self, histories=replace(self.histories, time_E=np.where(dated_E, self.histories.time_E, time)))


def ask_histories(
    saved: SavedRun, items: RawItems, given: Sequence[History | Sequence[str]], unknown: Unknown
) -> Asked:
    """Find the items of histories in the catalog of a run's dataset.

    Raises:
        HistoryError: see `read_histories`.
        ConfigError: titles are to be read that the run's system cannot read.
    """
    system = saved.config.system
    if unknown == "read" and not reads_titles_alone(system):
        raise ConfigError(
            f"{system.name} knows items by id and cannot read titles that its dataset does not have (tallrec and "
            "recformer can): leave such items out (--unknown skip), or train on a dataset that has them"
        )
    read = read_histories(given, items, unknown=unknown)
    dated = [isinstance(history, History) and history.times is not None for history in given]
    return Asked(read.histories, read.user_ids, dated, read.new_titles, read.skipped)


def find_candidates(items: RawItems, texts: Sequence[str]) -> IntArray:
    """The items to rank, ascending, each once.

    Raises:
        HistoryError: there is none, or a text names no item.
    """
    if not texts:
        raise HistoryError("no candidate was given: give at least one item to rank")
    try:
        return np.unique(items.items(texts))
    except UnknownItemError as error:
        raise HistoryError(f"a candidate cannot be ranked: {error}") from None


def ask_users(saved: SavedRun, raw_ids: Sequence[str], user_U: IntArray) -> Asked:
    """Users of a run's dataset with their whole histories, held-out items included, in the order given.

    Raises:
        DatasetError: a damaged shard.
    """
    from trainer.data.reading.shards import read_users  # webdataset imports torch

    sorted_U, row_U = np.unique(user_U, return_inverse=True)
    users = read_users(saved.config.data.path, saved.manifest, sorted_U).dated(saved.config.data.repeat_dates)
    histories = users.whole().take(row_U)
    return Asked(histories, raw_ids, [True] * len(raw_ids))


def ask_all(saved: SavedRun, raw_ids: Sequence[str]) -> Iterator[Asked]:
    """All users of a run's dataset, a few shards at a time.

    Args:
        raw_ids: raw user ids by user index.
    """
    from trainer.data.reading.shards import read_in_order  # webdataset imports torch

    for users in read_in_order(saved.config.data.path, saved.manifest, _GROUP):
        histories = users.dated(saved.config.data.repeat_dates).whole()
        yield Asked(histories, [raw_ids[user] for user in histories.user_U.tolist()], [True] * len(histories))


def latest_time(saved: SavedRun) -> int:
    """Time of the latest event of the dataset's first users, in milliseconds since 1970 UTC: what a history without
    times is dated, because a system that reads dates has learned from such ones."""
    if saved.export is not None:
        return saved.export.latest_time
    from trainer.data.reading.shards import read_shards  # webdataset imports torch

    return int(read_shards(saved.config.data.path, saved.manifest, [0]).whole().time_E.max())
