"""The page of an experiment: its table, intervals and tests, the runs behind it, and how to repeat it."""

from __future__ import annotations

from importlib.metadata import version

from trainer.reports.page.content import Block, Commands, Facts, Figure, File, Page, Section, Table, Text
from trainer.reports.page.figures import Span, interval_chart
from trainer.runs.commit import git_commit
from trainer.workflows.experiments.report import Report, column_label


def experiment_page(report: Report, command: str) -> Page:
    """The page of an experiment.

    Args:
        command: the command that repeats it.
    """
    experiment, budget = report.plan.experiment, report.plan.budget
    result: list[Block] = [report.table(), *(Text(note, small=True) for note in report.notes())]
    if figure := _figure(report):
        result.insert(1, figure)
    sections = [Section("Result", tuple(result) if report.numbers.cells else (Text("No results yet."),))]
    if report.numbers.tests:
        sections.append(Section(f"Against {experiment.reference}", (report.tests(),)))
    if report.cases:
        examples = (report.cases.examples,) if report.cases.examples else ()
        sections.append(Section("Who is right", (report.cases.counts, *examples)))
    if report.failed:
        failed = Table.of(("run", "error"), report.failed.items())
        sections.append(Section("Failed", (failed,)))
    runs = [
        (trained.run.label, str(trained.run.config.output), "failed" if trained.run.label in report.failed else "")
        for trained in report.plan.trained
    ]
    provenance = Facts((("dataset", budget.manifest.name), ("fingerprint", budget.manifest.fingerprint)))
    sections.append(Section("Runs", (provenance, Table.of(("run", "folder", ""), runs))))
    sections.append(Section("Reproduce", (Commands(command), File("table.csv", report.csv()))))
    return Page(
        title=experiment.title,
        subtitle=report.subtitle(),
        sections=tuple(sections),
        footer=f"llm-srec-trainer {version('llm-srec-trainer')}, commit {git_commit()}",
    )


def _figure(report: Report) -> Figure | None:
    """A panel per metric and group, a row per system: the first of its columns filled, the second hollow."""
    cells = {cell.place: cell for cell in report.numbers.cells if len(cell.value_U) > 1}
    rows = list(dict.fromkeys(place.row for place in cells))
    panels, shown = [], ""
    for metric, group in dict.fromkeys((place.metric, place.group) for place in cells):
        columns = dict.fromkeys(
            place._replace(row="") for place in cells if (place.metric, place.group) == (metric, group)
        )
        first, *others = columns
        second = others[0] if others else None
        spans = [
            Span(
                row,
                style,
                estimate.estimate if (estimate := cells.get(first._replace(row=row))) else None,
                other.estimate if second and (other := cells.get(second._replace(row=row))) else None,
            )
            for style, row in enumerate(rows)
        ]
        panels.append(interval_chart(" · ".join(part for part in (metric, group) if part), spans))
        if second:
            shown = f"Filled: {column_label(first)}. Hollow: {column_label(second)}."
    return Figure(tuple(panels), caption=f"{shown} Lines: 95 % intervals over users.".strip()) if panels else None
