"""Reads text tables: csv and its kin with any separator, with or without a header, in blocks of bounded size."""

import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from shards.formats.textfiles import first_lines, line_blocks, require_columns, shown
from shards.manifest import DatasetError

_SEPARATORS = ("\t", ",", ";", "::", "|", " ")
_STAND_IN = "\x1f"
"""The unit separator of ASCII, in place of separators that have more than one character."""
_TYPED = re.compile(r"[^\t]+:(token|float)(_seq)?(\t|$)")
_NUMBER = re.compile(r"-?\d+(\.\d+)?$")


@dataclass(frozen=True)
class Layout:
    """How text tables are written, where their first line does not say it.

    `separator` None: found in the first lines. `names` are the columns of files without a header, in order. `typed`:
    RecBole's tab-separated files with `user_id:token` headers.
    """

    separator: str | None = None
    names: tuple[str, ...] | None = None
    encoding: str = "utf-8"
    typed: bool = False


@dataclass(frozen=True)
class _Format:
    """The layout of one file; `columns` are all its columns, `header` the number of lines before the first row."""

    separator: str
    columns: list[str]
    header: int
    quoted: bool


def delimited_frames(path: Path, names: Mapping[str, str], layout: Layout) -> Iterator[pl.DataFrame]:
    """Yield the columns `names` (name in the file -> name in the frame) of a text table, all as stripped strings.

    Raises:
        DatasetError: an unreadable file, a missing column, or a line that cannot be split.
    """
    found = _format(path, list(names), layout)
    _check_header(path, list(names), found)
    header = found.header
    for line, block in _whole_rows(path, layout.encoding, found.quoted):
        if header:
            _, _, block = block.partition(b"\n")
            line, header = line + 1, 0
        if block.strip():
            yield _frame(path, line, block, found, names)


def delimited_columns(path: Path, wanted: Sequence[str], layout: Layout) -> list[str]:
    """Column names of a text table; the `wanted` ones help to find the separator."""
    return _format(path, wanted, layout).columns


def _format(path: Path, wanted: Sequence[str], layout: Layout) -> _Format:
    sample = first_lines(path, encoding=layout.encoding)
    lines = [line.rstrip("\r") for line in sample.decode("utf-8-sig").split("\n")[:10]]
    if not sample.strip():
        raise DatasetError(f"{path} is empty: download it again, or give a different file")
    # RecBole never quotes: a quotation mark is part of the title.
    typed = layout.typed or bool(_TYPED.match(lines[0]))
    separator = layout.separator or ("\t" if typed else _find_separator(path, lines, wanted, layout.names))
    quoted = not typed and separator != "::"
    if layout.names is not None:
        width = len(_fields(lines[0], separator, quoted))
        if width != len(layout.names):
            raise DatasetError(
                f"{path} has {width} columns separated by {separator!r}, not {len(layout.names)} "
                f"({shown(layout.names)}): its first line is {lines[0][:80]!r}: name them all with --columns "
                "(--meta-columns for titles), or give --separator"
            )
        return _Format(separator, list(layout.names), 0, quoted)
    columns = [name.strip() for name in _fields(lines[0], separator, quoted)]
    return _Format(separator, [name.partition(":")[0] for name in columns] if typed else columns, 1, quoted)


def _find_separator(path: Path, lines: list[str], wanted: Sequence[str], names: Sequence[str] | None) -> str:
    """The separator that gives all wanted columns, or the right number of them; else the most likely one."""
    for separator in _SEPARATORS:
        fields = _fields(lines[0], separator, quoted=True)
        if len(fields) == len(names) if names else set(wanted) <= {name.strip() for name in fields}:
            return separator
    if ".tsv" in path.name.lower():
        return "\t"
    rows = [line for line in lines[:-1] if line] or lines[:1]
    return next((mark for mark in _SEPARATORS if all(mark in line for line in rows)), ",")


def _fields(line: str, separator: str, quoted: bool) -> list[str]:
    if not quoted or len(separator) > 1:
        return line.split(separator)
    try:
        return next(csv.reader([line], delimiter=separator), [])
    except csv.Error:  # a field of more than 128 KiB, as whole lines are if this is not their separator
        return line.split(separator)


def _check_header(path: Path, wanted: list[str], found: _Format) -> None:
    """Check the columns; a first line with numbers is a row, which says more than that a column is missing."""
    missing = [name for name in wanted if name not in found.columns]
    if found.header and missing and any(_NUMBER.match(name) for name in found.columns):
        raise DatasetError(
            f"{path} seems to have no header (its first line is {shown(found.columns)}): name its columns in order "
            f"with --no-header --columns NAME,NAME,... (--meta-columns for titles), {', '.join(wanted)} among them"
        )
    require_columns(path, wanted, found.columns)


def _whole_rows(path: Path, encoding: str, quoted: bool) -> Iterator[tuple[int, bytes]]:
    """Yield (number of the first line, block) that end at the end of a row: quoted titles may hold line ends."""
    start, parts, open_quote = 1, list[bytes](), False
    for line, block in line_blocks(path, encoding=encoding):
        if line == 1:
            block = block.removeprefix(b"\xef\xbb\xbf")  # the byte order mark of some editors
        if not parts:
            start = line
        parts.append(block)
        # A row has an even number of quotation marks, because those in a quoted field are doubled.
        open_quote ^= quoted and block.count(b'"') % 2 == 1
        if not open_quote:
            yield start, b"".join(parts)
            parts = []
    if parts:
        yield start, b"".join(parts)


def _frame(path: Path, line: int, block: bytes, found: _Format, names: Mapping[str, str]) -> pl.DataFrame:
    separator = found.separator
    if len(separator) > 1:
        block, separator = block.replace(separator.encode(), _STAND_IN.encode()), _STAND_IN
    try:
        frame = pl.read_csv(
            block,
            has_header=False,
            separator=separator,
            quote_char='"' if found.quoted else None,
            infer_schema=False,
            new_columns=[f"column {place}" for place in range(len(found.columns))],
        )
        columns = [
            frame.to_series(found.columns.index(name)).str.strip_chars().alias(alias) for name, alias in names.items()
        ]
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, IndexError) as error:
        reason = str(error).strip().partition("\n")[0]
        if found.quoted and block.count(b'"') % 2:
            raise DatasetError(
                f"{path} is not a readable csv file (from line {line} on, a quotation mark is not closed: {reason}): "
                "fix it or convert it to parquet"
            ) from None
        fields = [text.count(separator.encode()) + 1 for text in block.split(b"\n")]
        longer = (number for number, count in enumerate(fields, line) if count > len(found.columns))
        raise DatasetError(
            f"{path}:{next(longer, line)} cannot be split into {len(found.columns)} columns ({reason}): "
            "check the separator, or convert it to parquet and use --source table"
        ) from None
    return pl.DataFrame(columns)
