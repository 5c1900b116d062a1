"""Recommendations as text, JSON, JSON lines or parquet."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from trainer.config import ConfigError
from trainer.runs.atomic import atomic_file

if TYPE_CHECKING:
    from trainer.workflows.recommending.recommend import Recommendations

Format = Literal["text", "json", "jsonl", "parquet"]
"""`json` is an array, `jsonl` one object per line; `parquet` has one row per recommended item."""
_SUFFIXES: dict[str, Format] = {".txt": "text", ".json": "json", ".jsonl": "jsonl", ".parquet": "parquet"}
_LATEST = 5
"""Items of a history that text shows."""
_ROWS_PER_GROUP = 100_000
_SCHEMA = pa.schema(
    [
        ("user_id", pa.string()),
        ("rank", pa.int32()),
        ("item_id", pa.string()),
        ("title", pa.string()),
        ("score", pa.float32()),
    ]
)


def check_output(file: Path | None, wanted: Format | None) -> Format:
    """The format to write: the one that is asked for, or else that of the file's suffix, or else text.

    Raises:
        ConfigError: parquet is to be printed, the suffix is of no known format, or the folder does not exist.
    """
    if file is None:
        if wanted == "parquet":
            raise ConfigError("--format parquet cannot be printed: name a file with --out FILE.parquet")
        return wanted or "text"
    found = wanted or _SUFFIXES.get(file.suffix)
    if found is None:
        raise ConfigError(f"--out {file}: name a .txt, .json, .jsonl or .parquet file, or give --format")
    if not file.absolute().parent.is_dir():
        raise ConfigError(f"--out {file}: {file.absolute().parent} is not a folder: make it first, or fix the path")
    return found


def write(answers: Iterable[Recommendations], file: Path | None, wanted: Format) -> int:
    """Write recommendations as they come; a file appears under its name once it is complete. Returns their number.

    Args:
        file: None: standard output.
        wanted: from `check_output`.
    """
    if file is None:
        return _write_text(answers, sys.stdout, wanted)
    with atomic_file(file) as beside:
        if wanted == "parquet":
            return _write_parquet(answers, beside)
        with beside.open("w", encoding="utf-8") as stream:
            return _write_text(answers, stream, wanted)


def _write_text(answers: Iterable[Recommendations], stream: TextIO, wanted: Format) -> int:
    count = 0
    for count, answer in enumerate(answers, 1):
        match wanted:
            case "text":
                stream.write(("\n" if count > 1 else "") + as_text(answer) + "\n")
            case "jsonl":
                stream.write(json.dumps(asdict(answer), ensure_ascii=False) + "\n")
            case _:
                stream.write(
                    ("[\n" if count == 1 else ",\n") + json.dumps(asdict(answer), ensure_ascii=False, indent=1)
                )
    if wanted == "json":
        stream.write("\n]\n" if count else "[]\n")
    return count


def as_text(answer: Recommendations) -> str:
    """For people: the latest items of the history, and the recommendations."""
    lines = [f"user {answer.user_id}, latest items:" if answer.user_id else "latest items:"]
    lines += [f"      {seen.date or ' ' * 10}  {seen.title}" for seen in answer.history[-_LATEST:]]
    lines.append("recommended:")
    width = max((len(item.item_id) for item in answer.recommendations), default=0)
    lines += [f"  {i.rank:>2}  {i.score:9.4f}  {i.item_id:<{width}}  {i.title}" for i in answer.recommendations]
    return "\n".join(lines)


def _write_parquet(answers: Iterable[Recommendations], path: Path) -> int:
    count = 0
    with pq.ParquetWriter(path, _SCHEMA, compression="zstd") as writer:
        for group in _groups(answers):
            count += len(group)
            pairs = [(answer.user_id, item) for answer in group for item in answer.recommendations]
            columns = [
                [user for user, _ in pairs],
                *([getattr(item, name) for _, item in pairs] for name in _SCHEMA.names[1:]),
            ]
            writer.write_table(pa.table(columns, schema=_SCHEMA))
    return count


def _groups(answers: Iterable[Recommendations]) -> Iterator[Sequence[Recommendations]]:
    """Answers with about `_ROWS_PER_GROUP` recommended items at a time."""
    group: list[Recommendations] = []
    rows = 0
    for answer in answers:
        group.append(answer)
        rows += len(answer.recommendations)
        if rows >= _ROWS_PER_GROUP:
            yield group
            group, rows = [], 0
    if group:
        yield group
