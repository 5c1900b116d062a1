"""Results of an experiment: JSON that a program reads, CSV, and Markdown that a person does."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.reports.page.content import Cell as Shown
from trainer.reports.page.content import Table
from trainer.reports.results import utc_now
from trainer.runs.atomic import write_atomically
from trainer.runs.commit import git_commit
from trainer.workflows.experiments.paper import PaperValues, paper_values
from trainer.workflows.experiments.planning import ExperimentPlan
from trainer.workflows.experiments.results import Cell, Change, Numbers, PairedTest, Place

if TYPE_CHECKING:
    from trainer.workflows.experiments.cases import RightAndWrong  # imports torch

_MISSING = "-"


@dataclass(frozen=True)
class Report:
    """An experiment with its numbers."""

    name: str
    plan: ExperimentPlan
    numbers: Numbers
    failed: Mapping[str, str]
    """Error by label of the run."""
    cases: RightAndWrong | None = None
    """Users by which systems are right; None: the experiment has no `cases`."""

    @property
    def paper(self) -> PaperValues:
        """The paper's values beside ours."""
        return paper_values(self.plan.experiment.table, self.plan.budget.manifest.name)

    def write(self, folder: Path) -> list[Path]:
        """Write all of it; returns the files."""
        folder.mkdir(parents=True, exist_ok=True)
        texts = {"results.json": self.json(), "table.csv": self.csv(), "table.md": self.markdown()}
        if self.cases:
            texts["cases.md"] = self.cases.markdown()
        for file, text in texts.items():
            write_atomically(folder / file, text)
        return [folder / file for file in texts]

    def json(self) -> str:
        """Everything, with the folder of each run, which has its users' ranks."""
        budget = self.plan.budget
        document = {
            "experiment": self.name,
            "title": self.plan.experiment.title,
            "definition": self.plan.experiment.model_dump(mode="json"),
            "recipe": budget.recipe.title,
            "dataset": budget.manifest.name,
            "dataset_fingerprint": budget.manifest.fingerprint,
            "options": dict(budget.options),
            "overrides": list(budget.overrides),
            "seeds": budget.seeds,
            "commit": git_commit(),
            "created": utc_now(),
            "runs": [
                {
                    **{key: getattr(trained, key) for key in ("system", "row", "training", "seed")},
                    "folder": str(trained.run.config.output),
                    "error": self.failed.get(trained.run.label, ""),
                }
                for trained in self.plan.trained
            ],
            "cells": [_cell_json(cell, self.paper) for cell in self.numbers.cells],
            "changes": [_change_json(change, self.paper) for change in self.numbers.changes],
            "tests": [_test_json(test) for test in self.numbers.tests],
        }
        return json.dumps(document, indent=1) + "\n"

    def csv(self) -> str:
        """One line per number."""
        file = io.StringIO()
        columns = (
            *Place._fields,
            "users",
            "seeds",
            "value",
            "low",
            "high",
            "seed_sd",
            "paper",
            "change",
            "paper_change",
        )
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        changes = {change.place: change for change in self.numbers.changes}
        for cell in self.numbers.cells:
            change = changes.get(cell.place)
            writer.writerow(
                {
                    **cell.place._asdict(),
                    "users": cell.users,
                    "seeds": len(cell.of_seeds),
                    **asdict(cell.estimate),
                    "seed_sd": cell.spread,
                    "paper": self.paper.value(cell.place),
                    "change": change and change.estimate.value,
                    "paper_change": self.paper.change(cell.place) if change else None,
                }
            )
        return file.getvalue()

    def markdown(self) -> str:
        """The table, the paired tests, and what failed."""
        experiment = self.plan.experiment
        parts = [f"# {experiment.title}", self.subtitle()]
        parts += [_markdown_table(self.table()), *self.notes()] if self.numbers.cells else ["No results yet."]
        if self.numbers.tests:
            parts += [f"## Against {experiment.reference}", _markdown_table(self.tests()), _TEST_NOTE]
        if self.cases:
            counts = self.cases.counts
            parts += ["## Who is right", _markdown_table(counts), f"{counts.note} Examples of each: `cases.md`."]
        if self.failed:
            lines = [f"* {label}: {error}" for label, error in self.failed.items()]
            parts += ["## Failed", "\n".join(lines)]
        return "\n\n".join(parts) + "\n"

    def subtitle(self) -> str:
        """On what the experiment was run, in one line."""
        budget = self.plan.budget
        seeds = f"{budget.seeds} seed{'s' * (budget.seeds > 1)}"
        facts = [budget.manifest.name, f"{budget.manifest.num_users:,} users", budget.recipe.title, seeds]
        facts += [f"{name}={value}" for name, value in budget.options.items()]
        return " · ".join([*facts, *budget.overrides])

    @property
    def _of_users(self) -> bool:
        """Whether the numbers are means over users."""
        return self.plan.experiment.measure in ("ranking", "similarity")

    def notes(self) -> list[str]:
        """What the table's signs mean."""
        seeds = self.plan.budget.seeds > 1
        notes = [
            "±: half the 95 % bootstrap interval over users" + " of their means over seeds" * seeds
        ] * self._of_users
        notes += ["sd: standard deviation over seeds"] * seeds
        notes += ["change: the second column against the first, with its 95 % interval"] * bool(self.numbers.changes)
        return [f"{'; '.join(notes)}."] if notes else []

    def table(self) -> Table:
        """Each column's values, then the changes, each followed by the paper's where it has any."""
        cells = {cell.place: cell for cell in self.numbers.cells}
        changes = {change.place: change for change in self.numbers.changes}
        rows = list(dict.fromkeys([trained.row for trained in self.plan.trained] or [place.row for place in cells]))
        shown: list[tuple[str, list[Shown]]] = [("system", [Shown(row) for row in rows])]
        if self._of_users:
            shown.append(("users", [Shown(_users(row, cells)) for row in rows]))
        for column in dict.fromkeys(place._replace(row="") for place in cells):
            shown.append((column_label(column), [_cell(cells.get(column._replace(row=row))) for row in rows]))
            shown += _of_the_paper([_number(self.paper.value(column._replace(row=row))) for row in rows])
        for column in dict.fromkeys(place._replace(row="") for place in changes):
            label = " ".join(part for part in ("change", column.group, column.metric) if part)
            shown.append((label, [_change(changes.get(column._replace(row=row))) for row in rows]))
            shown += _of_the_paper([_percent(self.paper.change(column._replace(row=row))) for row in rows])
        names, columns = zip(*shown, strict=True)
        return Table.of(names, zip(*columns, strict=True))

    def tests(self) -> Table:
        """The paired tests against the experiment's reference."""
        rows = [
            (
                column_label(test.place),
                test.place.row,
                Shown(f"{test.difference.value:+.4f}", test.difference.value),
                f"[{test.difference.low:+.4f}, {test.difference.high:+.4f}]",
                Shown(f"{test.p:.4f}", test.p),
                Shown(f"{test.adjusted:.4f}", test.adjusted),
            )
            for test in self.numbers.tests
        ]
        return Table.of(("column", "other", "difference", "95 % interval", "p", "p (Holm)"), rows, note=_TEST_NOTE)


def column_label(place: Place) -> str:
    """The label of a column: its metric, and what tells it from others."""
    return " · ".join(part for part in (place.metric, place.training, place.history, place.group) if part)


def _of_the_paper(values: list[Shown]) -> list[tuple[str, list[Shown]]]:
    return [("paper", values)] if any(value.key is not None for value in values) else []


def _users(row: str, cells: Mapping[Place, Cell]) -> str:
    counts = dict.fromkeys(f"{cell.users:,}" for place, cell in cells.items() if place.row == row)
    return " / ".join(counts) or _MISSING


def _cell(cell: Cell | None) -> Shown:
    if cell is None:
        return Shown(_MISSING)
    spread = "" if cell.spread is None else f" (sd {cell.spread:.4f})"
    if len(cell.value_U) > 1:
        text = f"{cell.estimate.value:.4f} ±{cell.estimate.half_width:.4f}{spread}"
    else:  # not measured per user
        text = f"{cell.estimate.value:,.4g}{spread}" if cell.of_seeds else f"{cell.estimate.value:,.0f}"
    return Shown(text, cell.estimate.value)


def _change(change: Change | None) -> Shown:
    if change is None:
        return Shown(_MISSING)
    found, low, high = (_percent(getattr(change.estimate, part)) for part in ("value", "low", "high"))
    return Shown(f"{found.text} [{low.text}, {high.text}]", found.key)


_TEST_NOTE = (
    "The mean of the reference minus that of the other, over the same users. p: two-sided permutation test over users; "
    "Holm: corrected over the systems of a column."
)


def _markdown_table(table: Table) -> str:
    rule = ["---", *["---:"] * (len(table.columns) - 1)]
    rows = [[cell.text for cell in row] for row in table.rows]
    lines = [[text.replace("|", "\\|") for text in row] for row in (table.columns, rule, *rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


def _cell_json(cell: Cell, paper: PaperValues) -> dict[str, Any]:
    return {
        **cell.place._asdict(),
        "users": cell.users,
        **asdict(cell.estimate),
        "seeds": dict(cell.of_seeds),
        "seed_sd": cell.spread,
        "paper": paper.value(cell.place),
    }


def _change_json(change: Change, paper: PaperValues) -> dict[str, Any]:
    return {**change.place._asdict(), **asdict(change.estimate), "paper": paper.change(change.place)}


def _test_json(test: PairedTest) -> dict[str, Any]:
    return {**test.place._asdict(), **asdict(test.difference), "p": test.p, "p_holm": test.adjusted}


def _number(value: float | None) -> Shown:
    return Shown(_MISSING) if value is None else Shown(f"{value:.4f}", value)


def _percent(value: float | None) -> Shown:
    return Shown(_MISSING) if value is None else Shown(f"{100 * value:+.1f} %", value)
