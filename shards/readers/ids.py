"""Raw ids as text: whole floats, to which pandas turns integers beside a missing value, become integers again."""

import logging
from collections import Counter
from pathlib import Path

import polars as pl

from shards.manifest import DatasetError

log = logging.getLogger("shards")

_MAX_ID_BYTES = 4096  # an id is hashed byte by byte, which takes seconds for a megabyte
_WHOLE = r"^-?\d+\.0$"
_EXACT = 2**53  # the first integer beyond which floats skip some
_POWER = r"^-?\d(\.\d+)?e\+\d\d$"  # how Python writes floats of 10^16 and more; a hash in hex digits has no plus


def as_ids(values: pl.Series, path: Path, counts: Counter[str]) -> pl.Series:
    """The ids as text; missing ones are null. Whole floats become integers with all digits, also above 2^53.

    Args:
        counts: gets the number of ids that were floats.

    Raises:
        DatasetError: values that are neither text nor numbers.
    """
    if values.dtype.is_float():
        floats = values.cast(pl.Float64).fill_nan(None)
        whole = (floats == floats.round()) & (floats.abs() < 2.0**63)
        if whole.all():
            counts["ids_from_floats"] += len(values) - floats.null_count()
            _warn_of_merged(floats.filter(floats.abs() >= _EXACT), path, counts)
            return floats.cast(pl.Int64).cast(pl.String)
        values = floats
    if values.dtype.is_nested():
        raise DatasetError(f"{path}: {values.name} ids are {values.dtype}: give text or whole numbers")
    try:
        texts = values.cast(pl.String)
    except pl.exceptions.PolarsError:
        raise DatasetError(f"{path}: {values.name} ids are {values.dtype}: give text or whole numbers") from None
    nested = (texts.str.starts_with('["') | texts.str.starts_with('{"')).fill_null(False)
    if nested.any():  # how JSON's lists and objects are read as text
        raise DatasetError(f"{path}: {values.name} ids such as {texts.filter(nested)[0][:40]} are not text: give ids")
    # Two cheap looks spare nearly all columns the patterns.
    if not texts.str.ends_with(".0").any() and not texts.str.contains("e+", literal=True).any():
        return texts
    whole = texts.str.contains(_WHOLE).fill_null(False)
    power = texts.str.contains(_POWER).fill_null(False)
    if not whole.any() and not power.any():
        return texts
    counts["ids_from_floats"] += int(whole.sum()) + int(power.sum())
    digits = texts.str.strip_suffix(".0")
    exact = pl.Series(texts.name, [str(int(float(text))) for text in texts.filter(power)], dtype=pl.String)
    _warn_of_merged(exact, path, counts)
    return digits.zip_with(whole, texts).scatter(power.arg_true(), exact)


def _warn_of_merged(ids: pl.Series, path: Path, counts: Counter[str]) -> None:
    """Count the ids that floats cannot tell apart, and warn of the first ones."""
    if len(ids) and not counts["ids_beyond_floats"]:
        log.warning(
            "warning: %s: %s ids such as %s are floats above 2^53, which cannot tell neighbours apart: "
            "different ids may have become one before they were written; write them as text or integers",
            path.name,
            ids.name,
            int(float(ids[0])),
        )
    counts["ids_beyond_floats"] += len(ids)


def check_ids(frame: pl.DataFrame, policy: str, counts: Counter[str]) -> pl.DataFrame:
    """Handle rows without a user or item id, and refuse ids that are too long to be one.

    Args:
        policy: `drop` such rows, counted in `counts`, or `error`.

    Raises:
        DatasetError: ids are missing and `policy` is `error`, or an id is too long.
    """
    for name in ("user", "item"):
        empty = (frame[name].is_null() | (frame[name] == "")).fill_null(True)
        if missing := int(empty.sum()):
            if policy != "drop":
                raise DatasetError(
                    f"{missing:,} events have no {name} id: remove these lines from the input, or use "
                    "--missing-ids drop"
                )
            counts["events_without_id"] += missing
            frame = frame.filter(~empty)
        longest = frame[name].gather([frame[name].str.len_bytes().arg_max() or 0])[0] if frame.height else ""
        if len(longest.encode()) > _MAX_ID_BYTES:
            raise DatasetError(
                f"the {name} id that begins with {longest[:40]!r} has more than {_MAX_ID_BYTES:,} bytes: "
                "choose the right column, or remove these lines from the input"
            )
    return frame
