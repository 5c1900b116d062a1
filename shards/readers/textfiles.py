"""Reads plain or gzip text in blocks of whole lines: bounded memory, and errors that name file and line."""

import gzip
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, cast

import polars as pl

from shards.manifest import MAX_EXPANSION, DatasetError, parse_json

BLOCK_BYTES = 32 << 20
_MAX_LINE_BYTES = 16 << 20
_SMALL = 64 << 20
"""A file may decompress to this many bytes, however well it is compressed."""


def check_readable(path: Path) -> None:
    """Check, before any work, that `path` is a file that can be opened; raises DatasetError."""
    if not path.exists():
        raise DatasetError(f"{path} does not exist: check the path")
    if not path.is_file():
        raise DatasetError(f"{path} is not a file: give the review files themselves")
    try:
        path.open("rb").close()
    except OSError as error:
        raise DatasetError(f"{path} cannot be read ({error.strerror}): check its permissions") from None


def line_blocks(path: Path, block_bytes: int = BLOCK_BYTES) -> Iterator[tuple[int, bytes]]:
    """Yield (number of the first line, from 1; block of whole lines). gzip is detected by content, not by name.

    Raises:
        DatasetError: an unreadable file, text that is not UTF-8, an endless line, or gzip of far more than its size.
    """
    line, rest = 1, b""
    for chunk in _chunks(path, block_bytes):
        head, newline, tail = chunk.rpartition(b"\n")
        if newline:
            block, rest = rest + head + newline, tail
            _check_utf8(path, line, block)
            yield line, block
            line += block.count(b"\n")
        else:
            rest += chunk
        if len(rest) > _MAX_LINE_BYTES:
            raise DatasetError(
                f"{path}:{line} is longer than {_MAX_LINE_BYTES:,} bytes: give a file with one record a line"
            )
    if rest:
        _check_utf8(path, line, rest)
        yield line, rest


def _chunks(path: Path, size: int) -> Iterator[bytes]:
    """Yield the decompressed content, `size` bytes at a time."""
    check_readable(path)
    allowed = max(_SMALL, MAX_EXPANSION * path.stat().st_size)
    try:
        with _open(path) as file:
            while chunk := file.read(size):
                allowed -= len(chunk)
                if allowed < 0:
                    raise DatasetError(
                        f"{path} decompresses to more than {MAX_EXPANSION} times its size, which no reviews do: "
                        "download it again, or decompress it first"
                    )
                yield chunk
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DatasetError(f"{path} is a truncated or damaged gzip file ({error}): download it again") from None
    except OSError as error:
        raise DatasetError(f"{path} cannot be read ({error.strerror}): check the disk") from None


def _check_utf8(path: Path, line: int, block: bytes) -> None:
    """Check the text here, where the line is known; some versions of polars panic on it."""
    try:
        block.decode()
    except UnicodeDecodeError as error:
        number = line + block.count(b"\n", 0, error.start)
        raise DatasetError(
            f"{path}:{number} is not UTF-8 text ({error.reason}): correct the line, or convert the file to UTF-8"
        ) from None


def json_frames(path: Path, schema: Mapping[str, pl.DataType], *, required: list[str]) -> Iterator[pl.DataFrame]:
    """Yield the fields in `schema` (strings, integers, lists of strings) of a JSON lines file, one object per line.

    Fields missing from a line are null.

    Raises:
        DatasetError: an empty file, a bad line, or a `required` field that is missing from the whole first block.
    """
    empty = True
    for line, block in line_blocks(path):
        try:
            frame = pl.read_ndjson(block, schema=dict(schema))
        # polars 1.30 panics on a line that is not an object, newer versions raise.
        except (pl.exceptions.PolarsError, pl.exceptions.PanicException):
            frame = _json_frame_slowly(path, line, block, schema)
        else:
            # polars reads a lone surrogate at the end of a text as NUL, which would merge ids.
            if b"\\u" in block and _has_nul(frame):
                frame = _json_frame_slowly(path, line, block, schema)
        if frame.height == 0:
            continue
        if empty:
            _require_fields(path, frame, block, required)
        empty = False
        yield frame
    if empty:
        raise DatasetError(f"{path} is empty: download it again")


def delimited_frames(
    path: Path, names: Mapping[str, str], *, separator: str, typed_header: bool
) -> Iterator[pl.DataFrame]:
    """Yield the columns `names` (name in the file -> name in the frame) of a delimited text file, all as strings.

    Args:
        typed_header: RecBole's `user_id:token` headers, where the part before the colon is the name.
    """
    header: bytes | None = None
    for line, block in line_blocks(path):
        if header is None:
            header, _, block = block.partition(b"\n")
            line += 1
            columns = _header_columns(path, header, separator, typed_header)
            require_columns(path, list(names), columns)
        if block.strip():
            yield _delimited_frame(path, line, block, columns, names, separator)
    if header is None:
        raise DatasetError(f"{path} is empty: download it again")


def header_columns(path: Path, *, separator: str, typed_header: bool) -> list[str]:
    """Column names of a delimited text file."""
    for _, block in line_blocks(path, block_bytes=1 << 16):
        return _header_columns(path, block.partition(b"\n")[0], separator, typed_header)
    raise DatasetError(f"{path} is empty: download it again")


def require_columns(path: Path, wanted: list[str], there: list[str]) -> None:
    """Check that all `wanted` columns are `there` once; raises DatasetError naming the first that is not."""
    for name in wanted:
        if there.count(name) > 1:
            raise DatasetError(f"{path} has {there.count(name)} columns {name!r}: rename or remove all but one")
        if name not in there:
            raise DatasetError(
                f"{path} has no column {name!r} (it has {shown(there)}): "
                "name the right column with --user-column, --item-column, --time-column or --title-column "
                "(--source table), or give a different --source"
            )


def shown(names: Iterable[str]) -> str:
    """Names for a message, in one line of bounded length."""
    text = ", ".join(repr(name)[1:-1] for name in names)
    return text if len(text) <= 300 else f"{text[:300]}..."


def _open(path: Path) -> BinaryIO:
    file = path.open("rb")
    magic = file.read(2)
    file.seek(0)
    if magic != b"\x1f\x8b":
        return file
    file.close()
    return cast(BinaryIO, gzip.open(path, "rb"))


def _header_columns(path: Path, header: bytes, separator: str, typed_header: bool) -> list[str]:
    text = header.decode("utf-8-sig").strip("\r\n")
    columns = [name.strip().strip('"') for name in text.split(separator)]
    return [name.partition(":")[0] for name in columns] if typed_header else columns


def _delimited_frame(
    path: Path, line: int, block: bytes, columns: list[str], names: Mapping[str, str], separator: str
) -> pl.DataFrame:
    # RecBole never quotes: a quotation mark is part of the title.
    quote = '"' if separator == "," else None
    try:
        frame = pl.read_csv(
            block,
            has_header=False,
            separator=separator,
            quote_char=quote,
            infer_schema=False,
            new_columns=columns,
        )
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        reason = str(error).strip().partition("\n")[0]
        fields = [text.count(separator.encode()) + 1 for text in block.split(b"\n")]
        longer = (number for number, count in enumerate(fields, line) if count > len(columns))
        raise DatasetError(
            f"{path}:{next(longer, line)} cannot be split into {len(columns)} columns ({reason}): "
            "check the separator, or convert it to parquet and use --source table"
        ) from None
    return frame.select(pl.col(name).str.strip_chars().alias(alias) for name, alias in names.items())


def _require_fields(path: Path, frame: pl.DataFrame, block: bytes, required: list[str]) -> None:
    absent = [name for name in required if frame[name].null_count() == frame.height]
    if absent:
        first = next(text for text in block.split(b"\n") if text.strip())
        raise DatasetError(
            f"{path} has no field {absent[0]!r} (it has {shown(parse_json(first))}): "
            "give a file of the right kind, or a different --source"
        )


def _has_nul(frame: pl.DataFrame) -> bool:
    columns = [frame[name].explode() if kind == pl.List else frame[name] for name, kind in frame.schema.items()]
    return any(texts.str.contains("\0", literal=True).any() for texts in columns if texts.dtype == pl.String)


def _json_frame_slowly(path: Path, line: int, block: bytes, schema: Mapping[str, pl.DataType]) -> pl.DataFrame:
    """Parse a block that polars rejected: either its values only need a cast, or the error names the bad line."""
    rows: list[list[object]] = []
    for number, text in enumerate(block.split(b"\n"), start=line):
        if not text.strip():
            continue
        try:
            record = parse_json(text)
        except ValueError as error:
            reason = str(error).partition(":")[0]
            raise DatasetError(
                f"{path}:{number} is not JSON ({reason}): download the file again, or remove the line"
            ) from None
        if not isinstance(record, dict):
            raise DatasetError(f"{path}:{number} is not a JSON object: give a file with one object a line")
        rows.append([_cast(path, number, name, record.get(name), kind) for name, kind in schema.items()])
    return pl.DataFrame(rows, schema=dict(schema), orient="row")


def _cast(path: Path, line: int, name: str, value: object, kind: pl.DataType) -> object:
    """The value as `kind`; raises DatasetError if it is not one."""
    if value is None:
        return None
    if kind == pl.String and isinstance(value, str | int) and _encodes(value):
        return str(value)
    if kind == pl.List(pl.String):
        if isinstance(value, str) and _encodes(value):
            return [value]
        if isinstance(value, list) and all(isinstance(entry, str) and _encodes(entry) for entry in value):
            return value
    if kind == pl.Int64 and isinstance(value, str | int | float) and not isinstance(value, bool):
        try:
            number = int(float(value)) if isinstance(value, float) else int(value)
        except (ValueError, OverflowError):
            number = 2**63
        if -(2**63) <= number < 2**63:
            return number
    raise DatasetError(f"{path}:{line} has {name!r} = {ascii(value)[:40]}, not {kind}: correct or remove the line")


def _encodes(value: object) -> bool:
    """Whether text is free of lone surrogates, the halves of a character that JSON can hold and UTF-8 cannot."""
    try:
        str(value).encode()
    except UnicodeEncodeError:
        return False
    return True
