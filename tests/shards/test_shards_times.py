"""Times of every kind: units guessed by size and reported, dates, text, and what is refused."""

import logging
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from shards_helpers import table_options, world, write_csv

from shards.__main__ import TIME_UNITS
from shards.build import build, prepare
from shards.manifest import DatasetError
from shards.readers.reviews import read_events
from shards.readers.sources import Columns
from shards.readers.times import UNITS, guess_unit

FIRST = datetime(2023, 1, 1, 3, tzinfo=UTC)
DAYS = [FIRST + timedelta(days=7 * week) for week in range(6)]
MS = [int(day.timestamp()) * 1000 for day in DAYS]


def times(tmp_path: Path, values: list[Any], unit: str | None = None, *, parquet: bool = False) -> list[int]:
    """The times (ms) that a table with these is read to."""
    path = tmp_path / f"r.{'parquet' if parquet else 'csv'}"
    if parquet:
        users = [f"u{n}" for n in range(len(values))]
        pl.DataFrame({"user": users, "item": "i", "time": values}).write_parquet(path)
    else:
        write_csv(path, [(f"u{n}", "i", value) for n, value in enumerate(values)])
    frames = read_events("table", (path,), Columns(time_unit=unit), user_fraction=1.0, seed=0)
    return pl.concat(frames).sort("user")["time"].to_list()


@pytest.mark.parametrize(("unit", "factor"), [("s", 1), ("ms", 10**3), ("us", 10**6), ("ns", 10**9)])
@pytest.mark.parametrize("parquet", [False, True])
def test_the_unit_is_guessed_and_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, unit: str, factor: int, parquet: bool
) -> None:
    caplog.set_level(logging.INFO, "shards")
    numbers = [ms // 1000 * factor for ms in MS]
    assert times(tmp_path, numbers, parquet=parquet) == MS
    assert f"times read as {unit} by their size" in caplog.text
    caplog.clear()
    assert times(tmp_path, numbers, unit, parquet=parquet) == MS
    assert "by their size" not in caplog.text


def test_nanoseconds_keep_their_milliseconds(tmp_path: Path) -> None:
    assert times(tmp_path, [1_672_542_000_123_999_999, 1_672_542_000_124_000_000], parquet=True) == [
        1_672_542_000_123,
        1_672_542_000_124,
    ]
    assert times(tmp_path, ["1.672542e+12", "1672542000123.0"]) == [1_672_542_000_000, 1_672_542_000_123]


def test_sizes_of_units_do_not_overlap() -> None:
    edges = [10**8, 4_102_444_800]
    for unit, factor in (("s", 1), ("ms", 10**3), ("us", 10**6), ("ns", 10**9)):
        assert [guess_unit(pl.Series([edge * factor])) for edge in edges] == [unit, unit]
        assert guess_unit(pl.Series([(edges[1] + 1) * factor])) is None
    assert guess_unit(pl.Series([19_700_101])) == guess_unit(pl.Series([20_231_231])) == "yyyymmdd"
    # A few bad times among good ones do not change the guess.
    assert guess_unit(pl.Series([0, -5, 7, *MS])) == "ms"
    assert guess_unit(pl.Series([0, -5])) is None


def test_dates_as_numbers(tmp_path: Path) -> None:
    numbers = [int(f"{day:%Y%m%d}") for day in DAYS]
    midnight = [ms - 3 * 3_600_000 for ms in MS]
    assert times(tmp_path, numbers) == times(tmp_path, numbers, "yyyymmdd", parquet=True) == midnight
    assert times(tmp_path, [0, *numbers[1:]]) == [0, *midnight[1:]]
    with pytest.raises(DatasetError, match=r"20230101 look like dates: set --time-unit yyyymmdd"):
        times(tmp_path, numbers, "s")
    with pytest.raises(DatasetError, match="20231345 is not a date YYYYMMDD"):
        times(tmp_path, [*numbers, 20231345])


@pytest.mark.parametrize(
    ("text", "ms"),
    [
        ("2023-01-01T03:00:00+00:00", MS[0]),
        ("2023-01-01T03:00:00Z", MS[0]),
        ("2023-01-01 03:00:00", MS[0]),
        ("2023-01-01T03:00", MS[0]),
        ("2023/01/01 03:00:00 UTC", MS[0]),
        ("2023-01-01T12:00:00+09:00", MS[0]),
        ("2022-12-31T21:30:00.250-0530", MS[0] + 250),
        ("2023-01-01 03:00:00.123456789", MS[0] + 123),
        ("2023-01-01", MS[0] - 3 * 3_600_000),
    ],
)
def test_iso_text(tmp_path: Path, text: str, ms: int) -> None:
    assert times(tmp_path, [text, ""]) == [ms, 0]
    assert times(tmp_path, [text, None], parquet=True) == [ms, 0]


@pytest.mark.parametrize("text", ["yesterday", "2023-02-30", "2023-01-01T25:00", "01/02/2023", "12:00"])
def test_text_that_is_no_time(tmp_path: Path, text: str) -> None:
    with pytest.raises(DatasetError, match=rf"{text!r} is not a time: give numbers since 1970, or dates such as 2023"):
        times(tmp_path, ["2023-01-01", text])


def test_all_dates_near_1970_are_refused(tmp_path: Path) -> None:
    """Seconds read as milliseconds, which once built a dataset whose prompts said 1970-01-20."""
    events = [(user, item, time // 1000) for user, item, time in world()]
    path = write_csv(tmp_path / "r.csv", events)
    with pytest.raises(DatasetError, match=r"all events are between 1970-01-18 .* set --time-unit s, ms, us, ns"):
        prepare(table_options(path, columns=Columns(time_unit="ms")))
    assert prepare(table_options(path, columns=Columns())).sequences.times.min() > 1_500_000_000_000 - 1
    in_order = prepare(table_options(path, columns=Columns(time_unit="order"))).sequences
    assert in_order.times.max() < 2_000_000_000  # kept as they are, because the user says so
    assert (
        build(tmp_path / "out", table_options(path, columns=Columns(time_unit="order"))).build["time_unit"] == "order"
    )


def test_rows_in_order_need_no_times(tmp_path: Path) -> None:
    events = sorted(world(), key=lambda event: (event[0], event[2], event[1]))
    path = tmp_path / "r.csv"
    path.write_text("user,item\n" + "".join(f"{user},{item}\n" for user, item, _ in events))
    with pytest.raises(DatasetError, match=r"no column 'time'.*if the rows of each user are in order"):
        prepare(table_options(path, columns=Columns()))
    dataset = prepare(table_options(path, columns=Columns(time_unit="order")))
    found = dataset.sequences
    user = str(found.user_ids[0])
    expected = [item for name, item, _ in events if name == user]
    held_out = [int(found.valid_items[0]), int(found.test_items[0])]
    items = [*found.items[found.offsets[0] : found.offsets[1]].tolist(), *held_out]
    assert [dataset.users.item_ids[item - 1] for item in items] == expected


def test_ties_in_the_order_of_the_file(tmp_path: Path) -> None:
    places = [(user, (user * 7 + place * 7) % 40) for user in range(40) for place in range(9)]
    events = [(f"u{user}", f"i{item}", 1_500_000_000) for user, item in places]
    path = write_csv(tmp_path / "r.csv", events)
    given = table_options(path, ties="file", columns=Columns())
    dataset = prepare(given)
    found = dataset.sequences
    for number, user in enumerate(found.user_ids):
        expected = [item for name, item, _ in events if name == user]
        items = [*found.items[found.offsets[number] : found.offsets[number + 1]]]
        items += [found.valid_items[number], found.test_items[number]]
        assert [dataset.users.item_ids[int(item) - 1] for item in items] == expected
    by_hash = prepare(table_options(path, columns=Columns()))
    assert by_hash.sequences.items.tolist() != found.items.tolist()
    # Recorded, and left out at the default, so that fingerprints of existing datasets stay.
    assert build(tmp_path / "file", given).build["ties"] == "file"
    assert "ties" not in build(tmp_path / "hash", table_options(path, columns=Columns())).build


def test_units_that_help_lists_are_those_that_are_read() -> None:
    assert tuple(TIME_UNITS) == UNITS
