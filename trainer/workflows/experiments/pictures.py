"""The picture of an experiment, by matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any, Final

from trainer.workflows.experiments.report import Report, column_label
from trainer.workflows.experiments.results import Cell, Place

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STYLE: Final[dict[Any, Any]] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "experiment",
}
"""With a salt of our own, equal results give equal files."""

_LETTERS_PER_INCH = 11
"""Letters of a title per inch of width, at its size."""


def draw(report: Report, folder: Path) -> list[Path]:
    """Draw an experiment's picture as PNG and SVG; no file if there is nothing to draw."""
    if not report.numbers.cells or not report.plan.trained:
        return []
    import matplotlib as mpl
    from matplotlib.figure import Figure  # without pyplot there is no global state and no display

    metrics = list(dict.fromkeys(cell.place.metric for cell in report.numbers.cells))
    with mpl.rc_context(_STYLE):
        width = 1.5 + 4.5 * len(metrics)
        figure = Figure(figsize=(width, 3.6), layout="constrained")
        axes = figure.subplots(1, len(metrics), squeeze=False)[0]
        for axis, metric in zip(axes, metrics, strict=True):
            cells = [cell for cell in report.numbers.cells if cell.place.metric == metric]
            (_scatter if report.plan.experiment.picture == "scatter" else _bars)(axis, cells, report)
        title = f"{report.plan.experiment.title} ({report.plan.budget.manifest.name})"
        figure.suptitle(fill(title, round(_LETTERS_PER_INCH * width)), fontsize=10)
        files = [folder / f"picture.{kind}" for kind in ("png", "svg")]
        for file in files:
            figure.savefig(file, dpi=200, metadata={"Date": None} if file.suffix == ".svg" else None)
    return files


def _bars(axis: Axes, cells: Sequence[Cell], report: Report) -> None:
    """A group of bars per row, a colour per column; lines: the intervals over users."""
    rows = list(dict.fromkeys(cell.place.row for cell in cells))
    columns = list(dict.fromkeys(cell.place._replace(row="") for cell in cells))
    by_place = {cell.place: cell for cell in cells}
    width = 0.8 / len(columns)
    for number, column in enumerate(columns):
        found = [
            (place, by_place[cell]) for place, row in enumerate(rows) if (cell := column._replace(row=row)) in by_place
        ]
        x = [place + (number - (len(columns) - 1) / 2) * width for place, _ in found]
        estimates = [cell.estimate for _, cell in found]
        values = [estimate.value for estimate in estimates]
        spread = [[e.value - e.low for e in estimates], [e.high - e.value for e in estimates]]
        axis.bar(x, values, width, yerr=spread, label=_legend(column), error_kw={"linewidth": 0.8})
    axis.set_xticks(range(len(rows)), rows, rotation=30, ha="right")
    axis.set_ylabel(columns[0].metric)
    if len(columns) > 1:
        axis.legend(frameon=False)


def _scatter(axis: Axes, cells: Sequence[Cell], report: Report) -> None:
    """The second of the compared columns against the first, with the line on which they are equal."""
    after = {change.place for change in report.numbers.changes}
    values = []
    for cell in (cell for cell in cells if cell.place in after):
        experiment, place = report.plan.experiment, cell.place
        first = (
            place._replace(training=next(iter(experiment.training)))
            if experiment.change == "training"
            else place._replace(history=next(iter(experiment.histories)))
        )
        before = next(other.estimate.value for other in cells if other.place == first)
        values += [before, cell.estimate.value]
        axis.scatter(before, cell.estimate.value)
        axis.annotate(place.row, (before, cell.estimate.value), xytext=(4, 4), textcoords="offset points")
        axis.set_xlabel(column_label(first._replace(group="")))
        axis.set_ylabel(column_label(place._replace(group="")))
    if values:
        ends = [0.95 * min(values), 1.05 * max(values)]
        axis.plot(ends, ends, color="grey", linewidth=0.8, linestyle="--", zorder=0)


def _legend(column: Place) -> str:
    return column_label(column._replace(metric=""))
