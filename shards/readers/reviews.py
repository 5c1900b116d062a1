"""Reads review files of all sources into one frame of events: user, item, time, and the split if the source has one.

Times become milliseconds since 1970, UTC. Users are sampled while reading, so that 5 % of a large category needs 5 % of
the memory.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from shards.hashing import hash_strings, stream_key
from shards.manifest import DatasetError
from shards.readers.tables import table_frames
from shards.readers.textfiles import check_readable, delimited_frames, json_frames

SOURCES = ("amazon2023", "amazon5core", "recbole", "table")
SPLITS = ("train", "valid", "test")
_MAX_ID_BYTES = 4096  # an id is hashed byte by byte, which takes seconds for a megabyte
_YEAR_2100_MS = 4_102_444_800_000
# Lower bound that times are clipped to, so that seconds cannot overflow when converted to ms; anything below is a bad
# time in either unit.
_LONG_AGO = -(10**15)


@dataclass(frozen=True)
class Columns:
    """Column names of a `table`, and the unit of its times: `s` or `ms`, not needed for date columns."""

    user: str = "user"
    item: str = "item"
    time: str = "time"
    title: str = "title"
    time_unit: str | None = None


@dataclass(frozen=True)
class Events:
    """Interactions with ids encoded as integers.

    `frame` has user:u32 and item:u32 (indices into `users` and `items`, which are sorted raw ids), time:i64 (ms) and,
    if the source has its own split, split:u8 (index into SPLITS).
    """

    frame: pl.DataFrame
    users: pl.Series
    items: pl.Series

    @property
    def given_split(self) -> bool:
        """Whether the source has its own train, validation and test split."""
        return "split" in self.frame.columns


def read_events(source: str, paths: tuple[Path, ...], columns: Columns, *, user_fraction: float, seed: int) -> Events:
    """Read all files, keeping the users whose seeded hash of the raw id is below `user_fraction`.

    Rows without a time get time 0, which `drop_bad_times` handles.

    Raises:
        DatasetError: unreadable files, missing columns, empty ids, times in the wrong unit, or no events.
    """
    for path in paths:
        check_readable(path)
    frames = [_sample(frame, user_fraction, seed) for frame in _checked(_frames(source, paths, columns), columns)]
    if not frames or sum(frame.height for frame in frames) == 0:
        raise DatasetError(
            f"no events in {', '.join(map(str, paths))} with --user-fraction {user_fraction}: "
            "raise --user-fraction or give different files"
        )
    return encode(pl.concat(frames))


def encode(frame: pl.DataFrame) -> Events:
    """Encode the raw ids of a frame (user, item, time[, split]) as indices into the sorted ids."""
    users = frame["user"].unique().sort()
    items = frame["item"].unique().sort()
    coded = frame
    for name, values in (("user", users), ("item", items)):
        codes = pl.DataFrame({name: values, "code": pl.arange(len(values), eager=True, dtype=pl.UInt32)})
        coded = coded.join(codes, on=name, how="left").drop(name).rename({"code": name})
    return Events(coded, users, items)


def drop_bad_times(events: Events, policy: str) -> tuple[Events, int]:
    """Drop events with time <= 0; returns also their number.

    Args:
        policy: `drop`, or `error` to raise instead.

    Raises:
        DatasetError: there are such events and `policy` is `error`; the message has an example.
    """
    bad = events.frame.filter(pl.col("time") <= 0)
    if bad.height and policy == "error":
        example = bad.sort("user", "item", "time").row(0, named=True)
        raise DatasetError(
            f"{bad.height:,} events have a missing, zero or negative time, such as user "
            f"{events.users[example['user']]!r} with item {events.items[example['item']]!r} "
            f"at {example['time']}: drop them with --bad-times drop"
        )
    return Events(events.frame.filter(pl.col("time") > 0), events.users, events.items), bad.height


def _frames(source: str, paths: tuple[Path, ...], columns: Columns) -> Iterator[pl.DataFrame]:
    if source == "amazon2023":
        return _amazon2023(paths)
    if source == "amazon5core":
        return _amazon5core(paths)
    if source == "recbole":
        return _recbole(paths, columns)
    if source == "table":
        return _table(paths, columns)
    raise DatasetError(f"unknown source {source!r}: choose one of {', '.join(SOURCES)}")


def _amazon2023(paths: tuple[Path, ...]) -> Iterator[pl.DataFrame]:
    schema = {"user_id": pl.String(), "parent_asin": pl.String(), "timestamp": pl.Int64()}
    for path in paths:
        for frame in json_frames(path, schema, required=list(schema)):
            yield frame.rename({"user_id": "user", "parent_asin": "item", "timestamp": "time"})


def _amazon5core(paths: tuple[Path, ...]) -> Iterator[pl.DataFrame]:
    names = {"user_id": "user", "parent_asin": "item", "timestamp": "time"}
    for split, path in _split_files(paths).items():
        code = pl.lit(SPLITS.index(split), dtype=pl.UInt8).alias("split")
        for frame in delimited_frames(path, names, separator=",", typed_header=False):
            yield frame.with_columns(to_ms(frame["time"], "ms", path), code)


def _recbole(paths: tuple[Path, ...], columns: Columns) -> Iterator[pl.DataFrame]:
    names = {"user_id": "user", "item_id": "item", "timestamp": "time"}
    for path in paths:
        for frame in delimited_frames(path, names, separator="\t", typed_header=True):
            # RecBole's own files have seconds.
            yield frame.with_columns(to_ms(frame["time"], columns.time_unit or "s", path))


def _table(paths: tuple[Path, ...], columns: Columns) -> Iterator[pl.DataFrame]:
    names = {columns.user: "user", columns.item: "item", columns.time: "time"}
    if len(names) < 3:
        raise DatasetError(
            f"user, item and time columns are {', '.join((columns.user, columns.item, columns.time))}: "
            "give three different ones with --user-column, --item-column and --time-column"
        )
    for path in paths:
        for frame in table_frames(path, names):
            ids = [_as_text(frame[name], path) for name in ("user", "item")]
            yield frame.with_columns(*ids, to_ms(frame["time"], columns.time_unit, path))


def _as_text(values: pl.Series, path: Path) -> pl.Series:
    try:
        return values.cast(pl.String)
    except pl.exceptions.PolarsError:
        raise DatasetError(f"{path}: {values.name} ids are {values.dtype}: give text or whole numbers") from None


def _split_files(paths: tuple[Path, ...]) -> dict[str, Path]:
    """Assign files to splits, by the word that starts a part of the file name (`x.valid.csv`)."""
    found: dict[str, Path] = {}
    for path in paths:
        words = set(re.findall(r"(?<![a-z])(train|valid|test)", path.name.lower()))
        if len(words) == 1:
            found.setdefault(words.pop(), path)
    if len(paths) != 3 or set(found) != set(SPLITS):
        raise DatasetError(
            f"--source amazon5core got {', '.join(path.name for path in paths)}: "
            "give exactly three files whose names contain train, valid and test"
        )
    return {split: found[split] for split in SPLITS}


def to_ms(times: pl.Series, unit: str | None, path: Path) -> pl.Series:
    """Convert times to whole milliseconds; missing ones become 0.

    Raises:
        DatasetError: times that are not numbers or dates, and numbers without a unit or in the wrong one.
    """
    if times.dtype in (pl.Date, pl.Datetime):
        return times.dt.epoch("ms").cast(pl.Int64).fill_null(0)
    if times.dtype != pl.String and not times.dtype.is_numeric():
        raise DatasetError(f"{path}: times are {times.dtype}: give numbers since 1970, or a parquet date column")
    if unit is None:
        raise DatasetError(f"{path}: column {times.name!r} has numbers: set --time-unit s or --time-unit ms")
    numbers = times.replace("", None) if times.dtype == pl.String else times
    # Integers do not go through floats, to stay exact; floats in seconds keep their milliseconds.
    whole = numbers.cast(pl.Int64, strict=False) if not numbers.dtype.is_float() else None
    scale = 1000 if unit == "s" else 1
    if whole is not None and whole.null_count() == numbers.null_count():
        _check_unit(whole.max(), scale, unit, path)
        return (whole.clip(lower_bound=_LONG_AGO) * scale).fill_null(0)
    floats = numbers.cast(pl.Float64, strict=False)
    refused = floats.is_null() & numbers.is_not_null() | floats.is_infinite().fill_null(False)
    if refused.any():
        raise DatasetError(
            f"{path}: {numbers.filter(refused)[0]!r} is not a time: give numbers since 1970 "
            "(or dates in a parquet date column)"
        )
    floats = floats.fill_nan(None).fill_null(0)
    _check_unit(floats.max(), scale, unit, path)
    return (floats.clip(lower_bound=_LONG_AGO) * scale).round().cast(pl.Int64)


def _check_unit(latest: object, scale: int, unit: str, path: Path) -> None:
    if isinstance(latest, int | float) and latest * scale > _YEAR_2100_MS:
        other = "ms" if unit == "s" else "s"
        raise DatasetError(
            f"{path}: time {latest} in {unit} is after the year 2100: set --time-unit {other}, or correct the file"
        )


def _checked(frames: Iterator[pl.DataFrame], columns: Columns) -> Iterator[pl.DataFrame]:
    """Yield the frames with columns in a fixed order; raises DatasetError for empty ids and for times after 2100."""
    order = ["user", "item", "time", "split"]
    for frame in frames:
        for name in ("user", "item"):
            empty = int((frame[name].is_null() | (frame[name] == "")).sum())
            if empty:
                raise DatasetError(f"{empty:,} events have no {name} id: remove these lines from the input")
            longest = frame[name].gather([frame[name].str.len_bytes().arg_max() or 0])[0] if frame.height else ""
            if len(longest.encode()) > _MAX_ID_BYTES:
                raise DatasetError(
                    f"the {name} id that begins with {longest[:40]!r} has more than {_MAX_ID_BYTES:,} bytes: "
                    "choose the right column, or remove these lines from the input"
                )
        frame = frame.with_columns(pl.col("time").fill_null(0))
        _check_unit(frame["time"].max(), 1, "ms", Path("input"))
        yield frame.select(name for name in order if name in frame.columns)


def _sample(frame: pl.DataFrame, fraction: float, seed: int) -> pl.DataFrame:
    """Keep the users whose seeded hash falls below `fraction` of the range of uint64."""
    if fraction >= 1.0:
        return frame
    users = frame["user"].unique()
    kept = hash_strings(users, stream_key(seed, "sample")) < np.uint64(int(fraction * 2**64))
    return frame.join(pl.DataFrame({"user": users.filter(pl.Series(kept))}), on="user", how="semi")
