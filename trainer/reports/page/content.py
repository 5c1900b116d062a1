"""The contents of a page, as plain data: sections of tables, figures, cases, commands and files.

Nothing here is HTML but the SVG of a panel, which `figures` draws: every text is escaped when it is rendered, so titles
of items and names of runs may hold anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from markupsafe import Markup

from trainer.evaluation.ranking import Estimate

MISSING = "–"


def signed(value: float, form: str) -> str:
    """A number with its sign, and a minus as wide as the plus."""
    return f"{value:+{form}}".replace("-", "−")


@dataclass(frozen=True)
class Cell:
    """A cell of a table."""

    text: str
    key: float | None = None
    """Number by which its column is sorted; None: sorted as text, and a missing number comes last."""
    strong: bool = False

    @staticmethod
    def of(value: Cell | Estimate | str | float | None) -> Cell:
        """Show a value: an estimate with half its interval, a number with four digits at most."""
        match value:
            case Cell():
                return value
            case Estimate():
                return Cell(f"{value.value:.4f} ±{value.half_width:.4f}", value.value)
            case None:
                return Cell(MISSING)
            case str():
                return Cell(value)
            case int():
                return Cell(f"{value:,}", value)
        return Cell(f"{value:,.4g}", value)


@dataclass(frozen=True)
class Table:
    """A table whose columns sort by a click on their head."""

    kind: ClassVar = "table"
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    numeric: tuple[bool, ...]
    """Whether each column holds numbers, which are set to the right."""
    title: str = ""
    note: str = ""

    @staticmethod
    def of(
        columns: Sequence[str],
        rows: Iterable[Sequence[Cell | Estimate | str | float | None]],
        *,
        title: str = "",
        note: str = "",
    ) -> Table:
        """Build a table from values, each as `Cell.of` shows it."""
        cells = tuple(tuple(Cell.of(value) for value in row) for row in rows)
        numeric = tuple(any(row[place].key is not None for row in cells) for place in range(len(columns)))
        return Table(tuple(columns), cells, numeric, title, note)


@dataclass(frozen=True)
class Panel:
    """One small chart."""

    title: str
    svg: Markup


@dataclass(frozen=True)
class Figure:
    """Panels side by side, as many as fit, with one legend."""

    kind: ClassVar = "figure"
    panels: tuple[Panel, ...]
    legend: tuple[tuple[str, int], ...] = ()
    """Name and style number of each series, as in `figures`."""
    caption: str = ""


@dataclass(frozen=True)
class Facts:
    """Names with short values."""

    kind: ClassVar = "facts"
    facts: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Answer:
    """What one system answered to a user."""

    system: str
    rank: int
    """Rank of the target; 1 is the best."""
    candidates: int
    top: tuple[tuple[str, bool], ...]
    """Titles that scored best, and whether each is the target."""
    best: bool = False
    """Whether no other system ranked the target higher."""


@dataclass(frozen=True)
class Case:
    """One user: the history, the item that came next, and each system's answer."""

    user: str
    why: str
    """The rule that chose the user."""
    history: tuple[tuple[str, str], ...]
    """Day and title of the latest events, oldest first."""
    earlier: int
    """Events before these."""
    target: str
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class Cases:
    """Users whose answers are shown, chosen by rule."""

    kind: ClassVar = "cases"
    cases: tuple[Case, ...]
    note: str = ""


@dataclass(frozen=True)
class Commands:
    """Shell commands."""

    kind: ClassVar = "commands"
    text: str
    note: str = ""


@dataclass(frozen=True)
class File:
    """A small text file that the reader can unfold and save."""

    kind: ClassVar = "file"
    name: str
    text: str


@dataclass(frozen=True)
class Text:
    """A paragraph, or a note in small print."""

    kind: ClassVar = "text"
    text: str
    small: bool = False


Block = Table | Figure | Facts | Cases | Commands | File | Text


@dataclass(frozen=True)
class Section:
    """A heading with its blocks."""

    title: str
    blocks: tuple[Block, ...]

    @property
    def anchor(self) -> str:
        """Its address within the page."""
        return "".join(letter if letter.isalnum() else "-" for letter in self.title.lower())


@dataclass(frozen=True)
class Tile:
    """A headline number."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Page:
    """A page."""

    title: str
    subtitle: str
    sections: tuple[Section, ...]
    tiles: tuple[Tile, ...] = ()
    verdict: str = ""
    """The result in one sentence."""
    footer: str = ""
