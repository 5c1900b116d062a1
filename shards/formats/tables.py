"""Reads columns of files of any format, found by name and content, as frames."""

import ast
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import polars as pl

from shards.formats.delimited import Layout, delimited_columns, delimited_frames
from shards.formats.parquet import parquet_columns, parquet_frames
from shards.formats.textfiles import check_readable, first_lines, json_frames, line_blocks, require_columns
from shards.manifest import DatasetError, parse_json

Format = Literal["parquet", "json", "python", "text"]

_PACKED = {b"PK\x03\x04": "zip", b"BZh": "bzip2", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ": "xz"}
_MAX_PYTHON = 1 << 20
_JSON = (".json", ".jsonl", ".ndjson")


def table_frames(path: Path, names: Mapping[str, str], layout: Layout | None = None) -> Iterator[pl.DataFrame]:
    """Yield the columns `names` (name in the file -> name in the frame).

    Columns of text tables and JSON are text; lists and objects in JSON are text in JSON.

    Raises:
        DatasetError: an unreadable file, or a missing column.
    """
    layout = layout or Layout()
    kind = file_format(path, layout)
    if kind == "parquet":
        yield from parquet_frames(path, names)
    elif kind == "python":
        yield from _python_frames(path, names)
    elif kind == "json":
        require_columns(path, list(names), table_columns(path, list(names), layout))
        for frame in json_frames(path, dict.fromkeys(names, pl.String()), required=[]):
            yield frame.rename(dict(names))
    else:
        yield from delimited_frames(path, names, layout)


def table_columns(path: Path, wanted: Sequence[str], layout: Layout | None = None) -> list[str]:
    """The column names of a file; of JSON, those in its first lines. The `wanted` ones help to find the separator."""
    layout = layout or Layout()
    kind = file_format(path, layout)
    if kind == "parquet":
        return parquet_columns(path)
    if kind == "text":
        return delimited_columns(path, wanted, layout)
    names: dict[str, None] = {}
    for text in first_lines(path).split(b"\n"):
        record = _record(text.decode()) if kind == "python" else _json_record(text)
        names |= dict.fromkeys(record)
    return list(names)


def file_format(path: Path, layout: Layout) -> Format:
    """The format of a file, by its name and first lines.

    Raises:
        DatasetError: an unreadable file, or one of a format that is not read, with what to do about it.
    """
    check_readable(path)
    name = path.name.lower().removesuffix(".gz")
    if name.endswith(".parquet"):
        return "parquet"
    with path.open("rb") as file:
        magic = file.read(6)
    if magic.startswith(b"PAR1"):
        return "parquet"
    if packed := next((kind for start, kind in _PACKED.items() if magic.startswith(start)), None):
        raise DatasetError(f"{path} is a {packed} archive: unpack it and give the files in it (gzip is read as is)")
    start = first_lines(path, encoding=layout.encoding).lstrip(b"\xef\xbb\xbf \t\r\n")
    if start[:9].lower().startswith((b"<html", b"<!doctype", b"<?xml")):
        raise DatasetError(
            f"{path} is a web page, not data (it begins with {start[:15].decode()!r}): download it again"
        )
    if start.startswith(b"[") and name.endswith(_JSON):
        raise DatasetError(
            f"{path} is one JSON list: write one object a line, for example with `jq -c '.[]' {path.name} > x.jsonl`"
        )
    first = start.partition(b"\n")[0]
    if start.startswith(b"{") and not _json_record(first) and _record(first.decode()):
        return "python"
    return "json" if start.startswith(b"{") or (start and name.endswith(_JSON)) else "text"


def _json_record(text: bytes) -> dict[str, object]:
    """The object in a line, empty for lines that hold none."""
    try:
        record = parse_json(text) if text.strip() else {}
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _record(text: str) -> dict[str, object]:
    """The dictionary in a line of Python, as in Amazon's files of 2014; empty for lines that hold none.

    Only literals are read; nothing is run. Lines of more than `_MAX_PYTHON` characters are none: parsed, each of them
    takes a hundred times its size.
    """
    if len(text) > _MAX_PYTHON:
        return {}
    try:
        record = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return {}
    return record if isinstance(record, dict) else {}


def _python_frames(path: Path, names: Mapping[str, str]) -> Iterator[pl.DataFrame]:
    for line, block in line_blocks(path):
        rows: list[list[str | None]] = []
        for number, text in enumerate(block.decode().split("\n"), start=line):
            if not text.strip():
                continue
            record = _record(text)
            if not record:
                raise DatasetError(
                    f"{path}:{number} is not a Python dictionary as the lines before (or too long): remove it"
                )
            rows.append([_text(record.get(name)) for name in names])
        yield pl.DataFrame(rows, schema=dict.fromkeys(names.values(), pl.String), orient="row")


def _text(value: object) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, default=str) if isinstance(value, list | dict) else str(value)
