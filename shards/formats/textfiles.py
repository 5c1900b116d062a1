"""Reads plain or gzip text in blocks of whole lines: bounded memory, and errors that name file and line."""

import codecs
import gzip
import json
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


def line_blocks(path: Path, block_bytes: int = BLOCK_BYTES, *, encoding: str = "utf-8") -> Iterator[tuple[int, bytes]]:
    """Yield (number of the first line, from 1; block of whole lines, UTF-8). gzip is detected by content, not by name.

    Raises:
        DatasetError: an unreadable file, text that is not UTF-8, an endless line, or gzip of far more than its size.
    """
    line, rest = 1, b""
    for chunk in _chunks(path, block_bytes):
        head, newline, tail = chunk.rpartition(b"\n")
        if newline:
            block, rest = rest + head + newline, tail
            yield line, _as_utf8(path, line, block, encoding)
            line += block.count(b"\n")
        else:
            rest += chunk
        if len(rest) > _MAX_LINE_BYTES:
            raise DatasetError(
                f"{path}:{line} is longer than {_MAX_LINE_BYTES:,} bytes: give a file with one record a line"
            )
    if rest:
        yield line, _as_utf8(path, line, rest, encoding)


def first_lines(path: Path, *, encoding: str = "utf-8", size: int = 1 << 16) -> bytes:
    """The whole lines in the first `size` bytes of the content, at least one; empty for an empty file."""
    head = next(_chunks(path, size), b"")
    whole = len(head) if len(head) < size else head.rfind(b"\n") + 1
    if whole or not head:
        return _as_utf8(path, 1, head[:whole], encoding)
    return next((block for _, block in line_blocks(path, encoding=encoding)), b"")


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


def is_utf8(path: Path) -> bool:
    """Whether the whole content is UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for chunk in _chunks(path, BLOCK_BYTES):
            decoder.decode(chunk)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return True


def _as_utf8(path: Path, line: int, block: bytes, encoding: str) -> bytes:
    """Check the text here, where the line is known; some versions of polars panic on it."""
    try:
        text = block.decode(encoding)
    except UnicodeDecodeError as error:
        number = line + block.count(b"\n", 0, error.start)
        name = "UTF-8" if encoding == "utf-8" else encoding
        raise DatasetError(
            f"{path}:{number} is not {name} text ({error.reason}): correct the line, convert the file to UTF-8, or "
            "name its encoding, such as --encoding latin-1"
        ) from None
    except LookupError:
        raise DatasetError(f"--encoding {encoding}: Python knows no such encoding: give one such as latin-1") from None
    return block if encoding == "utf-8" else text.encode()


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


def require_columns(path: Path, wanted: list[str], there: list[str]) -> None:
    """Check that all `wanted` columns are `there` once; raises DatasetError naming the first that is not."""
    for name in wanted:
        if there.count(name) > 1:
            raise DatasetError(f"{path} has {there.count(name)} columns {name!r}: rename or remove all but one")
        if name not in there:
            raise DatasetError(
                f"{path} has no column {name!r} (it has {shown(there)}): "
                "name the right column with --user-column, --item-column, --time-column, --title-column or "
                "--meta-id-column, or give a different --source"
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
    """The value as `kind`, as polars reads it; raises DatasetError if it is not one."""
    if value is None:
        return None
    if kind == pl.String and isinstance(value, float):
        return str(value)  # NaN among them
    if kind == pl.String and isinstance(value, str | int) and _encodes(value):
        return str(value)
    if kind == pl.String and isinstance(value, list | dict):
        # The fast path reads these as text, too; what reads the column decides whether that can be an id or a title.
        return json.dumps(value)
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
