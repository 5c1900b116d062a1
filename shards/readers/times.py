"""Times of all kinds as whole milliseconds since 1970, UTC: numbers in any unit, dates, ISO text, YYYYMMDD.

The unit of numbers is guessed from their size where neither an option nor the source says it, and always reported. The
sizes of the units do not overlap between 1973 and 2100, so that a guess is wrong only for times that are wrong.
"""

import logging
from datetime import UTC, datetime
from pathlib import Path

import polars as pl

from shards.manifest import DatasetError

log = logging.getLogger("shards")

UNITS = ("s", "ms", "us", "ns", "yyyymmdd", "order")
"""`order`: numbers that only order the events, such as positions; stored as they are."""

_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
_YEAR_1971_MS = 31_536_000_000
_YEAR_1973_S, _YEAR_2100_S = 10**8, 4_102_444_800
_FIRST_DAY, _LAST_DAY = 19_000_101, 21_001_231
# Lower bound that times are clipped to, so that seconds cannot overflow when converted to ms; anything below is a bad
# time in any unit.
_LONG_AGO = -(10**15)
_CURE = "set --time-unit s, ms, us, ns or yyyymmdd, or --time-unit order for numbers that only order the events"

# Parsed by a pattern: how libraries infer formats changes between their versions, and so would datasets.
_ISO = (
    r"^(\d{4}[-/]\d{2}[-/]\d{2})"
    r"(?:[T ]([01]\d|2[0-3]):([0-5]\d)(?::([0-5]\d|60)(?:[.,](\d{1,9}))?)?)?"
    r" ?(?:(Z|UTC|GMT)|([+-])(\d{2}):?(\d{2})?)?$"
)


def time_unit(times: pl.Series, given: str | None, default: str | None, path: Path) -> str | None:
    """The unit of a column of times, from the first rows of a file; None for dates and text, which have no unit.

    Args:
        given: the unit that the user named; always taken.
        default: the unit that files of this source have.

    Raises:
        DatasetError: nobody says the unit, and the size of the numbers does not either.
    """
    numbers = _numbers(times)
    if given is not None or numbers is None:
        return given
    guess = guess_unit(numbers)
    if guess is None and default is None:
        some = numbers.drop_nulls().drop_nans()
        raise DatasetError(
            f"{path}: column {times.name!r} has numbers such as {some[0] if len(some) else 'none'}, which are not "
            f"times between 1973 and 2100 in any unit: {_CURE}"
        )
    if guess is not None and guess != default:
        usual = f", not {default} as usual" if default else ""
        log.info("note: %s: times read as %s by their size%s (--time-unit sets the unit)", path.name, guess, usual)
    return guess or default


def guess_unit(numbers: pl.Series) -> str | None:
    """The unit in which the middle one of the positive numbers lies between 1973 and 2100, if there is one."""
    middle = numbers.filter(numbers > 0).median()
    if not isinstance(middle, int | float):
        return None
    if _FIRST_DAY <= middle <= _LAST_DAY:
        return "yyyymmdd"
    return next((unit for unit, n in _PER_SECOND.items() if _YEAR_1973_S * n <= middle <= _YEAR_2100_S * n), None)


def to_ms(times: pl.Series, unit: str | None, path: Path) -> pl.Series:
    """Convert times to whole milliseconds; missing ones become 0.

    Raises:
        DatasetError: times that are not numbers, dates or ISO text, and numbers without a unit or in the wrong one.
    """
    if times.dtype in (pl.Date, pl.Datetime):
        return times.dt.epoch("ms").cast(pl.Int64).fill_null(0)
    if times.dtype != pl.String and not times.dtype.is_numeric():
        raise DatasetError(f"{path}: times are {times.dtype}: give numbers since 1970, dates or ISO text")
    numbers = _numbers(times)
    if numbers is None:
        return _iso_ms(times, path)
    if unit is None:
        raise DatasetError(f"{path}: column {times.name!r} has numbers: {_CURE}")
    if unit == "yyyymmdd":
        return _days_ms(numbers, path)
    if unit == "s" and guess_unit(numbers) == "yyyymmdd":
        raise DatasetError(
            f"{path}: times such as {numbers.drop_nulls()[0]} look like dates: set --time-unit yyyymmdd, "
            "or --time-unit order if they are not"
        )
    if not numbers.dtype.is_float():
        # Integers do not go through floats, to stay exact.
        check_latest(numbers.max(), unit, path)
        whole = numbers.clip(lower_bound=_LONG_AGO)
        return (whole * 1000 if unit == "s" else whole // _per_ms(unit)).fill_null(0)
    floats = numbers.fill_nan(None).fill_null(0)
    check_latest(floats.max(), unit, path)
    # Floats in seconds keep their milliseconds.
    scaled = floats.clip(lower_bound=float(_LONG_AGO)) * (1000 if unit == "s" else 1 / _per_ms(unit))
    return scaled.round().cast(pl.Int64)


def check_latest(latest: object, unit: str, path: Path) -> None:
    """Check the largest of the numbers in `unit`; raises DatasetError for a time after 2100, naming the likely unit."""
    if unit == "order":
        unit = "ms"  # how positions are stored
    if not isinstance(latest, int | float) or latest <= _YEAR_2100_S * _PER_SECOND[unit]:
        return
    other = guess_unit(pl.Series([float(latest)]))
    cure = f"set --time-unit {other}, or correct the file" if other else "correct the file"
    raise DatasetError(f"{path}: time {latest} in {unit} is after the year 2100: {cure}")


def check_plausible(times: pl.Series, unit: str | None) -> None:
    """Report the span of all times (ms); raises DatasetError if they end before 1971, as times in a wrong unit do."""
    if unit == "order" or not len(times):
        return
    first, last = (datetime.fromtimestamp(int(str(ms)) / 1000, UTC) for ms in (times.min(), times.max()))
    if last.timestamp() * 1000 < _YEAR_1971_MS:
        raise DatasetError(
            f"all events are between {first:%Y-%m-%d %H:%M} and {last:%Y-%m-%d %H:%M}, as times in a wrong unit are: "
            f"{_CURE}"
        )
    log.info("times: from %s to %s", f"{first:%Y-%m-%d}", f"{last:%Y-%m-%d}")


def _per_ms(unit: str) -> int:
    return 1 if unit == "order" else _PER_SECOND[unit] // 1000


def _numbers(times: pl.Series) -> pl.Series | None:
    """Int64 or Float64 of a column of numbers, also those written as text; None for dates and other text."""
    if times.dtype.is_float():
        floats = times.cast(pl.Float64)
        return None if floats.is_infinite().any() else floats
    if times.dtype.is_numeric():
        return times.cast(pl.Int64, strict=False)
    if times.dtype != pl.String:
        return None
    texts = times.replace("", None)
    whole = texts.cast(pl.Int64, strict=False)
    if whole.null_count() == texts.null_count():
        return whole
    floats = texts.cast(pl.Float64, strict=False)
    if floats.null_count() == texts.null_count() and not floats.is_infinite().any():
        return floats
    return None


def _iso_ms(times: pl.Series, path: Path) -> pl.Series:
    """Milliseconds of ISO dates and times; those without a zone are taken as UTC."""
    if times.dtype != pl.String:
        raise _no_time(times, times.is_infinite(), path)
    texts = times.str.strip_chars().replace("", None)
    names = ("date", "hour", "minute", "second", "fraction", "utc", "sign", "zone_hour", "zone_minute")
    parts = texts.str.extract_groups(_ISO).struct.rename_fields(list(names)).struct.unnest()
    day = parts["date"].str.replace_all("/", "-", literal=True).str.to_date("%Y-%m-%d", strict=False)
    part = {name: parts[name].cast(pl.Int64, strict=False).fill_null(0) for name in names if name.endswith(("r", "e"))}
    seconds = parts["second"].cast(pl.Int64).fill_null(0)
    milliseconds = (parts["fraction"].str.pad_end(3, "0").str.slice(0, 3)).cast(pl.Int64).fill_null(0)
    zone = part["zone_hour"] * 60 + part["zone_minute"]
    minutes = (
        part["hour"] * 60
        + part["minute"]
        - zone
        * pl.Series((parts["sign"] == "-").fill_null(False)).replace_strict({True: -1, False: 1}, return_dtype=pl.Int64)
    )
    found = day.dt.epoch("ms").cast(pl.Int64) + (minutes * 60 + seconds) * 1000 + milliseconds
    refused = found.is_null() & texts.is_not_null()
    if refused.any():
        raise _no_time(texts, refused, path)
    return found.fill_null(0).alias(times.name)


def _days_ms(numbers: pl.Series, path: Path) -> pl.Series:
    """Milliseconds of numbers such as 20230131; numbers of zero and below are missing."""
    days = numbers.cast(pl.Int64, strict=False)
    texts = days.set(days <= 0, None).cast(pl.String)
    found = texts.str.to_date("%Y%m%d", strict=False)
    found = found.set(texts.str.len_chars() != 8, None)
    refused = found.is_null() & texts.is_not_null()
    if refused.any():
        raise DatasetError(f"{path}: {texts.filter(refused)[0]} is not a date YYYYMMDD: {_CURE}")
    return found.dt.epoch("ms").cast(pl.Int64).fill_null(0)


def _no_time(texts: pl.Series, refused: pl.Series, path: Path) -> DatasetError:
    return DatasetError(
        f"{path}: {texts.filter(refused)[0]!r} is not a time: give numbers since 1970, or dates such as 2023-01-31, "
        "2023-01-31 12:00:00 or 2023-01-31T12:00:00+02:00"
    )
