"""Histories as people give them: ids, titles and times of any kind, and what is refused."""

from __future__ import annotations

import json
from datetime import UTC, date, datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.raw.history import History, HistoryError, milliseconds, read_histories
from trainer.data.raw.items import RawItems, UnknownItemError
from trainer.data.raw.parsing import read_history_lines, read_lines

ITEMS = RawItems(
    ("a1", "b2", "7", "d4", "Alien"),
    ("Alien (1979)", "Aliens (1986)", "Twelve Monkeys (1995)", "twelve  monkeys (1995)", "The Alien Within"),
    "data/films",
)


def test_ids_come_before_titles() -> None:
    assert ITEMS.find("7") == 3
    assert ITEMS.find("Alien") == 5, "an id, though titles begin with it"
    assert ITEMS.find(' "ALIEN  (1979)" ') == 1
    assert ITEMS.find("alien") is None


def test_a_title_of_several_items_needs_an_id() -> None:
    with pytest.raises(UnknownItemError, match=r"2 items of data/films have the title .* give an id \('7', 'd4'\)"):
        ITEMS.find("Twelve Monkeys (1995)")


def test_a_mistyped_title_is_suggested() -> None:
    assert ITEMS.nearest("Alein (1979)")[0] == 1
    with pytest.raises(UnknownItemError, match=r"did you mean 'Aliens \(1986\)' \(id b2\)"):
        ITEMS.items(["Aliens 1986"])
    assert "data/films/catalog.parquet lists the items" in ITEMS.unknown("zzzz")
    assert "did you mean" not in ITEMS.unknown("")
    assert len(ITEMS.unknown("x" * 1_000_000)) < 300


def test_histories_become_numbers() -> None:
    read = read_histories(
        [["a1", "Aliens (1986)", "a1"], History(["7", "b2"], ["2024-05-02", "2024-05-01"], "me")], ITEMS, default_time=9
    )
    assert read.user_ids == (None, "me")
    assert read.histories.item_E.tolist() == [1, 2, 1, 2, 3], "sorted by time where there is one"
    assert read.histories.offset_U1.tolist() == [0, 3, 5]
    assert read.histories.time_E.tolist()[:3] == [9, 9, 9]


def test_unknown_items_are_skipped_or_numbered_on_request() -> None:
    skipped = read_histories([["a1", "nope", "b2"]], ITEMS, unknown="skip")
    assert (skipped.histories.item_E.tolist(), skipped.skipped) == ([1, 2], 1)
    new = read_histories([["a1", "nope"], ["other", "nope"]], ITEMS, unknown="read")
    assert new.new_titles == ("nope", "other")
    assert new.histories.item_E.tolist() == [1, 6, 7, 6]


@pytest.mark.parametrize(
    ("history", "unknown", "says"),
    [
        ([], "error", "it is empty: give at least one item"),
        ("a1", "error", "not the text 'a1': put it in a list"),
        (["nope", "x"], "skip", "none of its 2 items is in data/films"),
        ([1], "error", "item 1 is a int: give ids and titles as text"),
        ([" "], "read", "is not in data/films"),
        (History(["a1"], []), "error", "it has 1 items, but 0 times"),
        (History(["a1"], ["yesterday"]), "error", "'yesterday' is not a time: write 2024-05-31"),
        (History(["a1"], [True]), "error", "True is not a time"),
        (History(["a1"], [float("nan")]), "error", "nan is not a time"),
        (History(["a1"], [10**400]), "error", "is not a time"),
    ],
)
def test_histories_that_are_refused(history: object, unknown: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        read_histories([history], ITEMS, unknown=unknown)  # type: ignore[list-item, arg-type]


def test_one_line_for_many_bad_histories() -> None:
    with pytest.raises(HistoryError, match=r"^history 2 \(user 'me'\): item 'no'.* \(and 1 more of the 3 histories\)$"):
        read_histories([["a1"], History(["no"], None, "me"), []], ITEMS)
    with pytest.raises(HistoryError, match="no history was given"):
        read_histories([], ITEMS)


def test_a_long_history() -> None:
    read = read_histories([["a1", "b2"] * 50_000], ITEMS)
    assert len(read.histories.item_E) == 100_000


@pytest.mark.parametrize(
    ("time", "found"),
    [
        ("2024-05-31", datetime(2024, 5, 31, tzinfo=UTC)),
        (" 2024-05-31T18:00 ", datetime(2024, 5, 31, 18, tzinfo=UTC)),
        ("2024-05-31T18:00+02:00", datetime(2024, 5, 31, 16, tzinfo=UTC)),
        (date(2024, 5, 31), datetime(2024, 5, 31, tzinfo=UTC)),
        (datetime(2024, 5, 31, 2, tzinfo=timezone(timedelta(hours=2))), datetime(2024, 5, 31, tzinfo=UTC)),
        (874965758, datetime.fromtimestamp(874965758, UTC)),
        ("874965758", datetime.fromtimestamp(874965758, UTC)),
        (874965758000, datetime.fromtimestamp(874965758, UTC)),
        (874965758.5, datetime.fromtimestamp(874965758.5, UTC)),
    ],
)
def test_times(time: object, found: datetime) -> None:
    assert milliseconds(time) == found.timestamp() * 1000  # type: ignore[arg-type]


def test_history_lines(tmp_path: Path) -> None:
    file = tmp_path / "h.jsonl"
    lines = ['["a1", 7]', "", '{"history": ["x"], "times": [1, "2024-01-01"], "user_id": 5}', '{"items": ["y"]}']
    file.write_text("\ufeff" + "\r\n".join(lines))
    assert read_history_lines(file) == [History(["a1", "7"]), History(["x"], [1, "2024-01-01"], "5"), History(["y"])]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("[" * 100_000, "line 2: nested too deeply"),
        ("[1, ", "line 2: Expecting value"),
        ("7", "line 2: a history is a list of items"),
        ('[["a"]]', "line 2: .* is neither an id nor a title"),
        ("[true]", "line 2: 'True' is neither an id nor a title"),
        ("[1.5]", "line 2: '1.5' is neither an id nor a title"),
        ('{"history": "a1"}', 'line 2: "history" has to be a list'),
        ('{"history": ["a"], "times": 3}', 'line 2: "times" has to be a list'),
        ('{"historie": ["a"]}', "line 2: unknown key 'historie'"),
        ("9" * 5000, "line 2: "),
    ],
)
def test_lines_that_are_no_history(line: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "h.jsonl"
    file.write_text(f'["a1"]\n{line}\n')
    with pytest.raises(HistoryError, match=says):
        read_history_lines(file)


def test_files_that_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "lines"
    with pytest.raises(ValueError, match="does not exist: fix the path"):
        read_lines(file, "users")
    file.write_bytes(b"\n \n")
    with pytest.raises(ValueError, match="has no users: write one per line"):
        read_lines(file, "users")
    with pytest.raises(HistoryError, match="has no history: write one per line"):
        read_history_lines(file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        read_lines(file, "users")


KEYS = st.text() | st.sampled_from(["history", "times", "user_id"])
JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(KEYS, inner),
)


@settings(max_examples=40, deadline=None)
@given(JSON)
def test_any_json_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, value: object) -> None:
    file = tmp_path_factory.getbasetemp() / "any.jsonl"
    file.write_text(json.dumps(value))
    try:
        histories = read_history_lines(file)
        read = read_histories(histories, ITEMS, unknown="skip")
    except ValueError:
        return
    assert np.all((read.histories.item_E >= 1) & (read.histories.item_E <= len(ITEMS)))
