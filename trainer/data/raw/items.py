"""Raw item ids and titles of a catalog, and the items that a text names; torch-free."""

from __future__ import annotations

import difflib
import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from trainer.data.reading.counter_rng import IntArray
from trainer.data.reading.dataset import read_catalog

_SHORTLIST = 40
"""Titles compared letter by letter for a suggestion: those that share most trigrams with the text."""
_ALIKE = 0.6
"""Least similarity of a suggestion (`difflib`), from 0 to 1."""
_WORSE = 0.1
"""How much less similar than the best one a further suggestion may be."""
_SHOWN = 3
"""Suggestions, and ids of items that share a title, that a message names."""


class UnknownItemError(ValueError):
    """A text that names no item, or several; the message has the items that it may mean."""


@dataclass(frozen=True)
class RawItems:
    """The items of a catalog as its owner knows them; entry i - 1 belongs to item i."""

    ids: tuple[str, ...]
    titles: tuple[str, ...]
    source: str = "the catalog"
    """What messages call the catalog: the path of its dataset."""

    @staticmethod
    def read(path: Path, num_items: int) -> RawItems:
        """Read the ids and titles of a dataset's items.

        Raises:
            DatasetError: the catalog is damaged.
        """
        ids, titles = read_catalog(path, num_items, ["raw_id", "title"])
        return RawItems(tuple(ids), tuple(titles), str(path))

    def __len__(self) -> int:
        return len(self.ids)

    def find(self, text: str) -> int | None:
        """The item with this raw id, or else with this title; None if there is none.

        Titles are compared without regard to case, surrounding quotes and repeated spaces.

        Raises:
            UnknownItemError: several items have this title.
        """
        if (item := self._by_id.get(text)) is not None:
            return item
        found = self._by_title.get(normalized(text), [])
        if len(found) > 1:
            ids = ", ".join(repr(self.ids[item - 1]) for item in found[:_SHOWN])
            more = ", ..." if len(found) > _SHOWN else ""
            raise UnknownItemError(
                f"{len(found)} items of {self.source} have the title {text!r}: give an id ({ids}{more})"
            )
        return found[0] if found else None

    def items(self, texts: Iterable[str]) -> IntArray:
        """The items that these texts name, in order.

        Raises:
            UnknownItemError: a text names no item, or several.
        """
        return np.array([self._known(text) for text in texts], np.int64)

    def _known(self, text: str) -> int:
        if (item := self.find(text)) is None:
            raise UnknownItemError(self.unknown(text))
        return item

    def unknown(self, text: str) -> str:
        """Why a text names no item, with suggestions."""
        near = [f"{self.titles[item - 1]!r} (id {self.ids[item - 1]})" for item in self.nearest(text)]
        cure = f"did you mean {' or '.join(near)}?" if near else f"{self.source}/catalog.parquet lists the items"
        return f"item {_short(text)} is not in {self.source}, neither as an id nor as a title: {cure}"

    def search(self, text: str, most: int) -> list[int]:
        """Items for a person who types: the one with this id, then titles that begin with the text, then titles that
        contain it."""
        wanted = normalized(text)
        by_id = [self._by_id[text.strip()]] if text.strip() in self._by_id else []
        begins: list[int] = []
        contains: list[int] = []
        for item, title in enumerate(self._normalized, 1):
            if wanted in title:
                (begins if title.startswith(wanted) else contains).append(item)
            if len(begins) == most:
                break
        return list(dict.fromkeys([*by_id, *begins, *contains]))[:most]

    def nearest(self, text: str) -> list[int]:
        """Items whose titles are most like a text, the most similar first; empty if none is similar.

        Trigrams choose a shortlist, because comparing a text with a million titles letter by letter takes minutes.
        """
        wanted = normalized(text)[:200]
        grams = {wanted[at : at + 3] for at in range(max(len(wanted) - 2, 1))}
        scored = ((sum(gram in title for gram in grams), -row) for row, title in enumerate(self._normalized))
        shortlist = [-row for count, row in heapq.nlargest(_SHORTLIST, scored) if count]
        matcher = difflib.SequenceMatcher(b=wanted, autojunk=False)
        ratios: list[tuple[float, int]] = []
        for row in shortlist:
            matcher.set_seq1(self._normalized[row][:200])
            ratios.append((-matcher.ratio(), row))
        ratios.sort()
        least = max(_ALIKE, -ratios[0][0] - _WORSE) if ratios else 1.0
        return [row + 1 for ratio, row in ratios[:_SHOWN] if -ratio >= least]

    @cached_property
    def _by_id(self) -> dict[str, int]:
        return {raw_id: item for item, raw_id in enumerate(self.ids, 1)}

    @cached_property
    def _by_title(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for item, title in enumerate(self._normalized, 1):
            found.setdefault(title, []).append(item)
        return found

    @cached_property
    def _normalized(self) -> Sequence[str]:
        return [normalized(title) for title in self.titles]


def normalized(title: str) -> str:
    """The title as compared: without surrounding quotes and repeated spaces, case-folded."""
    return " ".join(title.strip().strip('"').split()).casefold()


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")
