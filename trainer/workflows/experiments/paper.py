"""The values that the paper prints, to be shown beside ours."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from trainer.config.presets import PRESETS
from trainer.workflows.experiments.results import Place


@dataclass(frozen=True)
class PaperValues:
    """One table of the paper on one dataset; empty where it has none."""

    rows: Mapping[str, Mapping[str, float]]
    elsewhere: Mapping[str, Mapping[str, Mapping[str, float]]]
    """Rows by name of the other dataset, of a table of tests on others."""

    def value(self, place: Place) -> float | None:
        """The paper's value at a place of our table."""
        if place.group:
            rows = self.elsewhere.get(place.group, {})
            return rows.get(place.row, {}).get(place.metric)
        column = place.metric
        column += f" | train={place.training}" if place.training else ""
        column += f" | inference={place.history}" if place.history else ""
        return self.rows.get(place.row, {}).get(column)

    def change(self, place: Place) -> float | None:
        """The paper's change to the second column, as a share."""
        percent = self.rows.get(place.row, {}).get(f"{place.metric} | change_ratio_pct")
        return None if percent is None else percent / 100


def paper_values(table: str | None, dataset: str) -> PaperValues:
    """The paper's values of a table for a dataset of this name; none if it is not one of the paper's."""
    of_datasets = _tables().get(table or "", {})
    rows: Mapping[str, Mapping[str, float]] = {}
    elsewhere: dict[str, Mapping[str, Mapping[str, float]]] = {}
    for name, found in of_datasets.items():
        source, arrow, other = name.partition("->")
        if source.casefold() == dataset.casefold():
            rows = rows if arrow else found
            elsewhere |= {other: found} if arrow else {}
    return PaperValues(rows, elsewhere)


@cache
def _tables() -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    tables: dict[str, dict[str, dict[str, dict[str, float]]]] = json.loads((PRESETS / "paper_tables.json").read_text())[
        "tables"
    ]
    return tables
