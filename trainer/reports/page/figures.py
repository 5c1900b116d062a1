"""Small charts as SVG, drawn by matplotlib, whose colours follow the page's light or dark theme.

matplotlib writes colours into the SVG. It draws with placeholder colours, which are replaced by the page's CSS
variables; and texts stay texts, in the page's font.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from markupsafe import Markup, escape

from trainer.evaluation.ranking import Estimate
from trainer.reports.page.content import Panel

_INK, _GRID = "#000101", "#000102"
_SERIES: Final = ("#000201", "#000202", "#000203", "#000204", "#000205", "#000206", "#000207", "#000208")
_VARIABLES: Final = {_INK: "--muted", _GRID: "--grid", **{c: f"--series-{k}" for k, c in enumerate(_SERIES, 1)}}
_DASHES: Final = ((), (5.0, 2.0), (1.5, 1.5), (6.0, 1.5, 1.5, 1.5))
"""Lines also differ by their dashes, for print without colours."""
_SIZE: Final = (4.0, 2.45)
"""Inches; a panel is as wide as a phone."""
_RC: Final[dict[Any, Any]] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a `$` in a name is a dollar
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.7,
    "text.color": _INK,
    "xtick.color": _GRID,
    "ytick.color": _GRID,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "legend.frameon": False,
}

_OPENING: Final = re.compile(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>')
_CLEANED: Final = (
    (
        re.compile(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", re.DOTALL),
        "",
    ),  # a style holds for the whole page
    (re.compile(r' id="(?![mp][0-9a-f]{10})[^"]*"'), ""),  # ids that nothing refers to, the same in all charts
    (re.compile(r"font: [^;\"]*?(\d+(?:\.\d+)?)px[^;\"]*"), r"font-size: \1px"),  # in the page's font
    (re.compile(r"font-family: [^;\"]*; "), ""),
)


@dataclass(frozen=True)
class Line:
    """A curve."""

    style: int
    """Number of its colour and dashes; the same series has the same one in all panels."""
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Span:
    """A row of an interval chart: a run's estimate, and the one with shuffled histories."""

    name: str
    style: int
    original: Estimate | None
    shuffled: Estimate | None = None


def line_chart(
    title: str, lines: Sequence[Line], x: str, *, log_x: bool = False, log_y: bool = False, x_ticks: Sequence[int] = ()
) -> Panel:
    """Curves over a common axis; few points also get markers, and one curve alone no dashes.

    Args:
        x: label of the horizontal axis.
    """
    with _drawing(title) as (figure, axes):
        for line in lines:
            axes.plot(
                line.x,
                line.y,
                color=_colour(line.style),
                dashes=(_DASHES[line.style % len(_DASHES)] if len(lines) > 1 else ()) or (None, None),
                marker="o" if len(line.x) <= 12 else None,
                markersize=3.5,
            )
        if log_x:
            axes.set_xscale("log")
        if log_y:
            axes.set_yscale("log")
        for axis, is_log in ((axes.xaxis, log_x), (axes.yaxis, log_y)):
            _set_ticks(axis, is_log=is_log)
        if x_ticks:
            axes.set_xticks(x_ticks)
        axes.set_xlabel(x)
        axes.margins(x=0.02)
        return Panel(title, _svg(figure, title))


def interval_chart(title: str, spans: Sequence[Span], chance: float | None = None) -> Panel:
    """A row per run: its estimate with its 95 % interval, filled, and below it that of shuffled histories, hollow.

    Args:
        chance: a dashed line at the level that random scores reach.
    """
    with _drawing(title, height=0.7 + 0.42 * len(spans)) as (figure, axes):
        for row, span in enumerate(spans):
            for shift, estimate, face in ((-0.13, span.original, _colour(span.style)), (0.17, span.shuffled, "none")):
                if estimate is not None:
                    axes.errorbar(
                        [estimate.value],
                        [row + shift],
                        xerr=[[estimate.value - estimate.low], [estimate.high - estimate.value]],
                        fmt="o",
                        color=_colour(span.style),
                        markerfacecolor=face,
                        markersize=6 if face != "none" else 4.5,
                        elinewidth=1.8 if face != "none" else 1.0,
                    )
        if chance is not None:
            axes.axvline(chance, color=_INK, linewidth=0.9, linestyle=(0, (3, 3)))
        axes.set_yticks(range(len(spans)), [_short(span.name) for span in spans])
        axes.set_ylim(len(spans) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        return Panel(title, _svg(figure, title))


def legend_line(style: int) -> Markup:
    """A sample of a series' line, for a legend."""
    dashes = " ".join(str(length) for length in _DASHES[style % len(_DASHES)])
    return Markup(
        '<svg class="sample" viewBox="0 0 26 8" aria-hidden="true"><line x1="1" x2="25" y1="4" y2="4" '
        'style="stroke:var({})" stroke-dasharray="{}"/></svg>'
    ).format(_VARIABLES[_colour(style)], dashes)


@contextmanager
def _drawing(title: str, height: float = _SIZE[1]) -> Iterator[tuple[Any, Any]]:
    """A figure and its axes, with the settings of all charts while it is drawn and written."""
    # Late, because the import takes a third of a second; without pyplot, which would look for a display.
    import matplotlib as mpl
    from matplotlib.figure import Figure

    # The salt names the parts of an SVG, which must differ between those of one page.
    with mpl.rc_context({**_RC, "svg.hashsalt": title}):
        figure = Figure(figsize=(_SIZE[0], height), layout="constrained")
        yield figure, figure.subplots()


def _set_ticks(axis: Any, *, is_log: bool) -> None:
    """Plain numbers, at 1, 2 and 5 times the powers of ten of a logarithmic axis."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if is_log:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=6))
        axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(FuncFormatter(lambda value, _: _compact(value)))


def _compact(value: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * (10 if unit == "k" else 1):
            return f"{value / size:g}{unit}"
    return f"{value:.12g}"


def _colour(style: int) -> str:
    return _SERIES[style % len(_SERIES)]


def _short(name: str) -> str:
    return name if len(name) <= 24 else name[:11] + "…" + name[-12:]


def _svg(figure: Any, title: str) -> Markup:
    buffer = io.StringIO()
    # Without a date, so that a page of the same runs has the same bytes.
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for pattern, by in _CLEANED:
        text = pattern.sub(by, text)
    text = _OPENING.sub(_opening(title), text, count=1)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    return Markup(text)


def _opening(title: str) -> str:
    label = str(escape(title)).replace("\\", r"\\")
    return (
        rf'<svg class="chart" viewBox="\1" role="img" aria-label="{label}" xmlns:xlink="http://www.w3.org/1999/xlink">'
    )
