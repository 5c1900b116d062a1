"""Reads review files of all sources as frames of events: user, item, time, and the split if the source has one.

Times become milliseconds since 1970, UTC. Users are sampled while reading, so that 5 % of a large category needs 5 % of
the memory.
"""

import logging
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import polars as pl

from shards.formats.delimited import Layout
from shards.formats.tables import file_format, table_columns, table_frames
from shards.formats.textfiles import check_readable, json_frames, shown
from shards.manifest import DatasetError
from shards.readers.benchmark import history_events, list_column
from shards.readers.files import reviews_layout
from shards.readers.ids import as_ids, check_ids
from shards.readers.sampling import Sample, sampler
from shards.readers.sources import Columns, Source, picked, source_named
from shards.readers.times import check_latest, time_unit, to_ms

log = logging.getLogger("shards")

SPLITS = ("train", "valid", "test")
_GIVEN_SPLIT = "amazon5core"

LEFT_OUT = "outside_user_fraction"
"""Key of the number of events that the sample of users leaves out: known after reading, and not part of a dataset."""


def read_events(
    source: str,
    paths: tuple[Path, ...],
    columns: Columns,
    *,
    user_fraction: float,
    seed: int,
    sample: Sample = "hash",
    missing_ids: str = "error",
    keep_rows: bool = False,
    counts: Counter[str] | None = None,
) -> Iterator[pl.DataFrame]:
    """Yield frames of all files with user and item (raw ids), time (ms), split (index into `SPLITS`) if the source has
    its own, and row with `keep_rows`; only events of `user_fraction` of the users.

    Rows without a time get time 0.

    Args:
        sample: which users are kept (`sampling.py`).
        missing_ids: `drop` rows without a user or item id, or `error`.
        keep_rows: number the rows in the order of the input.
        counts: gets the number of rows that were dropped and ids that were changed, by reason.

    Raises:
        DatasetError: unreadable files, missing columns, empty ids, or times in the wrong unit.
    """
    counts = Counter() if counts is None else counts
    known = source_named(source)
    for path in paths:
        check_readable(path)

    def frames(counts: Counter[str]) -> Iterator[pl.DataFrame]:
        return _numbered(_checked(_frames(source, known, paths, columns, counts), missing_ids, counts))

    kept = sampler(sample, user_fraction, seed, lambda: frames(Counter()))
    for frame in frames(counts):
        chosen = kept(frame if keep_rows else frame.drop("row"))
        counts[LEFT_OUT] += frame.height - chosen.height
        yield chosen


def note_on_names(source: str, paths: tuple[Path, ...], columns: Columns) -> None:
    """Report that files named train, valid and test are not taken as a split, where they are not."""
    if len({word for path in paths for word in _split_words(path)}) < 2 or source == _GIVEN_SPLIT:
        return
    if not _has_histories(source, paths, columns):
        log.info("note: the files named train, valid and test are read as one log, which is split anew")


def _frames(
    name: str, source: Source, paths: tuple[Path, ...], columns: Columns, counts: Counter[str]
) -> Iterator[pl.DataFrame]:
    """Frames of user, item, time and the split, if the source has one."""
    histories = _has_histories(name, paths, columns)
    if name == _GIVEN_SPLIT or histories:
        by_split = _split_files(name, paths, complete=name == _GIVEN_SPLIT)
    else:
        by_split = [(None, path) for path in paths]
    if histories:
        yield from history_events(by_split, columns, source, counts)
        return
    position = 0
    for split, path in by_split:
        for frame in _file_frames(name, source, path, columns, counts):
            if "time" not in frame.columns:  # --time-unit order: the rows are in order
                frame = frame.with_columns(time=pl.int_range(position + 1, position + 1 + frame.height, dtype=pl.Int64))
                position += frame.height
            code = [] if split is None else [pl.lit(SPLITS.index(split), dtype=pl.UInt8).alias("split")]
            yield frame.with_columns(code)


def _has_histories(name: str, paths: tuple[Path, ...], columns: Columns) -> bool:
    """Whether rows of the files are whole histories, with a target each."""
    return name == "recbole" and any(list_column(path, columns, source_named(name)) for path in paths)


def _file_frames(
    name: str, source: Source, path: Path, columns: Columns, counts: Counter[str]
) -> Iterator[pl.DataFrame]:
    """Frames of user, item and time of one file; without time if the order of rows stands for it."""
    layout = reviews_layout(path, source, columns)
    names = _event_names(source, path, columns, layout)
    unit: str | None = None
    for number, frame in enumerate(_raw_frames(name, path, names, layout)):
        found = [as_ids(frame[side], path, counts) for side in ("user", "item")]
        if "time" in frame.columns:
            times = frame["time"]
            if number == 0:
                unit = time_unit(times, columns.time_unit, source.unit, path)
            found.append(to_ms(times, unit or source.unit, path).alias("time"))
        yield pl.DataFrame(found)


def _raw_frames(name: str, path: Path, names: dict[str, str], layout: Layout) -> Iterator[pl.DataFrame]:
    """The columns as they are in the file. Of Amazon's reviews of 2023 a time that is no integer is named with its
    line, because these files are read most."""
    if name == "amazon2023" and file_format(path, layout) == "json":
        schema = {column: pl.Int64() if alias == "time" else pl.String() for column, alias in names.items()}
        for frame in json_frames(path, schema, required=list(names)):
            yield frame.rename(names)
    else:
        yield from table_frames(path, names, layout)


def _event_names(source: Source, path: Path, columns: Columns, layout: Layout) -> dict[str, str]:
    """Columns of the file to be read as user, item and time."""
    first = [columns.user or source.user[0], columns.item or source.item[0], columns.time or source.time[0]]
    there = table_columns(path, first, layout)
    user, item = picked(columns.user, source.user, there), picked(columns.item, source.item, there)
    time = picked(columns.time, source.time, there)
    names = {user: "user", item: "item", time: "time"}
    if len(names) < 3:
        raise DatasetError(
            f"user, item and time columns are {', '.join((user, item, time))}: "
            "give three different ones with --user-column, --item-column and --time-column"
        )
    if columns.time is None and time not in there:
        if columns.time_unit == "order":
            del names[time]
        elif {user, item} <= set(there):
            raise DatasetError(
                f"{path} has no column {time!r} (it has {shown(there)}): name the right one with --time-column, or, if "
                "the rows of each user are in order, use --time-unit order, which numbers them"
            )
    return names


def _split_files(source: str, paths: tuple[Path, ...], *, complete: bool) -> list[tuple[str | None, Path]]:
    """Assign files to splits, by the word that starts a part of the file name (`x.valid.csv`).

    Args:
        complete: all three splits are needed; else any of them once.
    """
    found: dict[str, Path] = {}
    for path in paths:
        words = _split_words(path)
        if len(words) == 1:
            found.setdefault(words.pop(), path)
    if len(found) != len(paths) or (complete and set(found) != set(SPLITS)):
        number = "exactly three" if complete else "one to three"
        raise DatasetError(
            f"--source {source} got {', '.join(path.name for path in paths)}: "
            f"give {number} files whose names contain train, valid and test"
        )
    return [(split, found[split]) for split in SPLITS if split in found]


def _split_words(path: Path) -> set[str]:
    return set(re.findall(r"(?<![a-z])(train|valid|test)", path.name.lower()))


def _checked(frames: Iterator[pl.DataFrame], missing_ids: str, counts: Counter[str]) -> Iterator[pl.DataFrame]:
    """Yield the frames with columns in a fixed order; raises DatasetError for empty ids and for times after 2100."""
    order = ["user", "item", "time", "split"]
    for frame in frames:
        frame = check_ids(frame, missing_ids, counts)
        frame = frame.with_columns(pl.col("time").fill_null(0))
        check_latest(frame["time"].max(), "ms", Path("input"))
        yield frame.select(name for name in order if name in frame.columns)


def _numbered(frames: Iterator[pl.DataFrame]) -> Iterator[pl.DataFrame]:
    """Add `row`, counted over all frames."""
    rows = 0
    for frame in frames:
        yield frame.with_row_index("row", offset=rows)
        rows += frame.height
