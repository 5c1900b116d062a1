"""Reads columns of csv, tsv and parquet files as frames; those of parquet are of bounded size."""

import io
from collections.abc import Iterator, Mapping
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from shards.manifest import DatasetError
from shards.readers.textfiles import check_readable, header_columns, line_blocks, require_columns

_ROWS = 1 << 20
_CSV_SUFFIXES = (".csv", ".csv.gz", ".tsv", ".tsv.gz")


def table_frames(path: Path, names: Mapping[str, str]) -> Iterator[pl.DataFrame]:
    """Yield the columns `names` (name in the file -> name in the frame) of a csv, tsv or parquet file.

    Columns of csv and tsv are strings, stripped.

    Raises:
        DatasetError: an unreadable file, an unknown suffix or a missing column.
    """
    check_readable(path)
    if path.name.lower().endswith(".parquet"):
        yield from _parquet_frames(path, names)
    elif path.name.lower().endswith(_CSV_SUFFIXES):
        yield _csv_frame(path, names)
    else:
        raise DatasetError(f"{path} has an unknown suffix: give {', '.join(_CSV_SUFFIXES)} or .parquet files")


def table_columns(path: Path) -> list[str]:
    """The column names of a csv, tsv or parquet file."""
    check_readable(path)
    if path.name.lower().endswith(".parquet"):
        with _open_parquet(path) as file:
            return list(file.schema_arrow.names)
    return header_columns(path, separator=_separator(path), typed_header=False)


def _separator(path: Path) -> str:
    return "\t" if ".tsv" in path.name.lower() else ","


def _csv_frame(path: Path, names: Mapping[str, str]) -> pl.DataFrame:
    # Read at once: a quoted title may contain newlines, so the file cannot be split at line ends.
    content = b"".join(block for _, block in line_blocks(path))
    if not content.strip():
        raise DatasetError(f"{path} is empty: give a different file")
    try:
        frame = pl.read_csv(io.BytesIO(content), separator=_separator(path), infer_schema=False)
    except pl.exceptions.PolarsError as error:
        reason = str(error).strip().partition("\n")[0]
        raise DatasetError(f"{path} is not a readable csv file ({reason}): fix it or convert it to parquet") from None
    require_columns(path, list(names), frame.columns)
    return frame.select(pl.col(name).str.strip_chars().alias(alias) for name, alias in names.items())


def _open_parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise DatasetError(f"{path} is not a readable parquet file ({reason}): write or download it again") from None


def _parquet_frames(path: Path, names: Mapping[str, str]) -> Iterator[pl.DataFrame]:
    with _open_parquet(path) as file:
        require_columns(path, list(names), list(file.schema_arrow.names))
        try:
            for batch in file.iter_batches(batch_size=_ROWS, columns=list(names)):
                frame = pl.DataFrame(pl.from_arrow(batch))
                yield frame.select(pl.col(name).alias(alias) for name, alias in names.items())
        except (pa.ArrowException, OSError) as error:
            raise DatasetError(f"{path} is a damaged parquet file ({error}): write or download it again") from None
