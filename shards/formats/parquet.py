"""Reads columns of parquet files as frames of bounded size."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import polars as pl
import polars.selectors as cs
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from shards.formats.textfiles import require_columns
from shards.manifest import MAX_EXPANSION, DatasetError

_ROWS = 1 << 20
_BATCH_BYTES = 1 << 30
"""Most bytes of text in a batch of `_ROWS` rows: 1 KB a row."""
_ROW_BYTES = 256
"""Most bytes per row, decompressed, of files whose row groups are read whole, unless they have `_SMALL_BYTES`."""
_SMALL_BYTES = 64 << 20
_WRITE_AGAIN = "write or download it again"
_TEXTS = (pa.string(), pa.large_string())


def _open_parquet(path: Path, texts: Sequence[str] = ()) -> pq.ParquetFile:
    """Open a parquet file; `texts` are columns to be read as references to their distinct values."""
    try:
        return pq.ParquetFile(path, read_dictionary=texts)
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(f"{path} is not a readable parquet file ({_reason(error)}): {_WRITE_AGAIN}") from None


def parquet_columns(path: Path) -> list[str]:
    """The column names of a parquet file."""
    with _open_parquet(path) as file:
        return list(file.schema_arrow.names)


def parquet_rows(path: Path) -> int:
    """The number of rows of a parquet file, as it says itself."""
    with _open_parquet(path) as file:
        return int(file.metadata.num_rows)


def parquet_frames(path: Path, names: Mapping[str, str]) -> Iterator[pl.DataFrame]:
    """Yield the columns `names` (name in the file -> name in the frame), at most a million rows at a time.

    Raises:
        DatasetError: a damaged file, a missing column, or one of a type that is neither text, number nor date.
    """
    with _open_parquet(path) as file:
        require_columns(path, list(names), list(file.schema_arrow.names))
        metadata = file.metadata
        _check_expansion(path, metadata)
        types = {name: file.schema_arrow.field(name).type for name in names}
    converted = _converted_frames(path, names, [name for name, type_ in types.items() if type_ in _TEXTS])
    if all(map(_is_plain, types.values())) and _is_small(metadata, set(names)):
        return _frames(path, names, metadata.num_rows, converted)
    return converted


def _is_plain(type_: pa.DataType) -> bool:
    return type_ in _TEXTS or pa.types.is_integer(type_) or pa.types.is_floating(type_)


def _is_small(metadata: pq.FileMetaData, names: set[str]) -> bool:
    """Whether `_ROWS` rows of some columns are known to fit into memory, as polars decodes whole row groups."""
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    sizes = []
    for group in groups:
        columns = [group.column(place) for place in range(group.num_columns)]
        sizes.append(sum(column.total_uncompressed_size for column in columns if column.path_in_schema in names))
    bounded = all(size <= _ROW_BYTES * group.num_rows for size, group in zip(sizes, groups, strict=True))
    return (bounded or sum(sizes) <= _SMALL_BYTES) and all(group.num_rows <= 2 * _ROWS for group in groups)


def _frames(
    path: Path, names: Mapping[str, str], rows: int, otherwise: Iterator[pl.DataFrame]
) -> Iterator[pl.DataFrame]:
    """Columns of text and numbers, as polars reads them: in a quarter of the time that `_converted_frames` takes.

    In polars, the rows that refer to a text of the dictionary share its bytes, so that they can be measured before they
    are copied.

    Args:
        otherwise: all frames, should polars not be able to read the first, or to say what is wrong with it.
    """
    columns = pl.scan_parquet(path, glob=False).select(cs.by_name(*names)).rename(dict(names))
    for first in range(0, rows, _ROWS):
        try:
            frame = columns.slice(first, _ROWS).collect()
        except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as error:
            if first == 0:
                yield from otherwise
                return
            raise _damaged(path, error) from None
        for name, alias in names.items():
            if frame[alias].dtype == pl.String:
                # In 64 bits: a million rows of a long text are more than 4 GiB.
                _check_size(path, name, frame.height, int(frame[alias].str.len_bytes().cast(pl.UInt64).sum()))
        yield frame.select(names.values())


def _converted_frames(path: Path, names: Mapping[str, str], texts: Sequence[str]) -> Iterator[pl.DataFrame]:
    """Columns of any type, and of files with very large row groups."""
    # Texts stay references until they were measured: a million rows may all refer to one long text.
    with _open_parquet(path, texts) as file:
        try:
            for batch in file.iter_batches(batch_size=_ROWS, columns=list(names)):
                yield pl.DataFrame([_series(path, name, batch.column(name)).alias(names[name]) for name in names])
        except (pa.ArrowException, OSError) as error:
            raise _damaged(path, error) from None


def _damaged(path: Path, error: BaseException) -> DatasetError:
    return DatasetError(f"{path} is a damaged parquet file ({_reason(error)}): {_WRITE_AGAIN}")


def _check_size(path: Path, name: str, rows: int, size: int) -> None:
    if size > _BATCH_BYTES:
        raise DatasetError(f"{path}: {rows:,} rows of column {name!r} hold {size:,} bytes: {_WRITE_AGAIN}")


def _check_expansion(path: Path, metadata: pq.FileMetaData) -> None:
    """Refuse a file made to fill the memory, by what it says about itself."""
    groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
    columns = [group.column(place) for group in groups for place in range(group.num_columns)]
    stored = sum(column.total_compressed_size for column in columns)
    if sum(column.total_uncompressed_size for column in columns) > max(_BATCH_BYTES, MAX_EXPANSION * stored):
        raise DatasetError(
            f"{path} decompresses to more than {MAX_EXPANSION} times its size, which no reviews do: {_WRITE_AGAIN}"
        )


def _series(path: Path, name: str, values: pa.Array) -> pl.Series:
    """A column of a batch as polars has it; bytes become text."""
    try:
        if pa.types.is_dictionary(values.type) and values.type.value_type in _TEXTS:
            size = pc.sum(pc.binary_length(values.dictionary).take(values.indices)).as_py() or 0
            _check_size(path, name, len(values), size)
            values = values.cast(pa.large_string())
        if pa.types.is_binary(values.type) or pa.types.is_large_binary(values.type):
            values = values.cast(pa.large_string())
        values.validate(full=True)  # or bytes that are not UTF-8 would pass for text
        return pl.Series(name, values)
    except (pa.ArrowException, pl.exceptions.PolarsError, pl.exceptions.PanicException, TypeError) as error:
        raise DatasetError(
            f"{path}: column {name!r} ({values.type}) cannot be read ({_reason(error)}): "
            "write it as text, numbers or dates"
        ) from None


def _reason(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:200]
