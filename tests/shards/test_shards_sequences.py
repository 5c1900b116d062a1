"""The data protocol, checked by hand on small examples and against a plain Python version on random ones."""

import random
from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shards_helpers import (
    Event,
    options,
    read_named,
    table_options,
    titles_of,
    world,
    write_amazon,
    write_csv,
)

from shards.build import build, prepare
from shards.manifest import DatasetError, Stage
from shards.partitions.blocks import encode
from shards.partitions.clean import Cleaned, cleaned
from shards.partitions.parts import LocalParts
from shards.partitions.split import AllSequences, build_sequences
from shards.sequences import Filters, Sequences

T0 = 1_500_000_000_000
LOOSE = Filters(min_user=1, min_item=1, min_train=2)


def built(frame: pl.DataFrame, filters: Filters, seed: int = 0) -> tuple[AllSequences, tuple[Stage, ...], Cleaned]:
    """Sequences of events with raw ids, the stages, and what was dropped before."""
    events, items = encode(frame, seed)
    parts, found = cleaned(LocalParts([events]), items, seed)
    return *build_sequences(parts, items, filters, seed), found


def all_of(events: list[Event], filters: Filters = LOOSE, seed: int = 0) -> AllSequences:
    frame = pl.DataFrame(events, schema={"user": pl.String, "item": pl.String, "time": pl.Int64}, orient="row")
    return built(frame, filters, seed)[0]


def sequences_of(events: list[Event], filters: Filters = LOOSE, seed: int = 0) -> Sequences:
    return all_of(events, filters, seed).together()


def named(found: AllSequences) -> dict[str, tuple[list[str], str, str]]:
    """(train, valid, test) raw item ids of each raw user id."""
    item = ["", *found.item_ids.to_list()]
    sequences = found.together()
    return {
        user: (
            [item[n] for n in sequences.items[sequences.offsets[u] : sequences.offsets[u + 1]]],
            item[sequences.valid_items[u]],
            item[sequences.test_items[u]],
        )
        for u, user in enumerate(sequences.user_ids)
    }


def test_leave_last_out_by_hand() -> None:
    events = [("a", item, T0 + time) for item, time in (("e", 50), ("b", 20), ("d", 40), ("a", 10), ("c", 30))]
    found = all_of([*events, ("short", "a", T0), ("short", "b", T0 + 1), ("short", "c", T0 + 2)])
    sequences = found.together()
    assert named(found) == {"a": (["a", "b", "c"], "d", "e")}
    assert sequences.times.tolist() == [T0 + 10, T0 + 20, T0 + 30]
    assert (sequences.valid_times.tolist(), sequences.test_times.tolist()) == ([T0 + 40], [T0 + 50])
    assert sequences.lengths.tolist() == [5]


def test_a_repeated_purchase_is_kept_and_a_repeated_line_dropped() -> None:
    events = [("a", item, T0 + n) for n, item in enumerate("xyxzx")]
    assert named(all_of([*events, events[0], events[4]])) == {"a": (["x", "y", "x"], "z", "x")}


#   u1: a b c d   u2: a b c d   u3: a b c   u4: d e f
# With 3 needed everywhere: a, b, c, d have 3, 3, 3, 3; e and f have 1. u4 has 3 events, so one pass keeps u4
# with d alone. Iterated, u4 (1 event left) goes, then d (2 left) goes; u1, u2, u3 keep a, b, c.
K_CORE = [("u1", "abcd"), ("u2", "abcd"), ("u3", "abc"), ("u4", "def")]


def test_k_core_in_one_pass_and_iterated() -> None:
    events = [(user, item, T0 + n) for user, items in K_CORE for n, item in enumerate(items)]
    frame = pl.DataFrame(events, schema=["user", "item", "time"], orient="row")
    once = Filters(min_user=3, min_item=3, min_train=2)
    stages = built(frame, once)[1]
    assert [(s.name, s.users, s.items, s.interactions) for s in stages] == [
        ("k-core", 4, 4, 12),
        ("min-train", 2, 4, 8),
    ]
    with pytest.raises(DatasetError, match=r"k-core: 3 users, 3 items; min-train: 0 users.*--min-train"):
        built(frame, Filters(min_user=3, min_item=3, min_train=2, iterate=True))


def k_core_by_hand(events: list[Event], filters: Filters) -> list[Event]:
    while True:
        users, items = Counter(user for user, _, _ in events), Counter(item for _, item, _ in events)
        kept = [e for e in events if users[e[0]] >= filters.min_user and items[e[1]] >= filters.min_item]
        if not filters.iterate or kept == events:
            return kept
        events = kept


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 5), st.integers(2, 4), st.booleans())
def test_the_protocol_against_plain_python(seed: int, user: int, item: int, train: int, iterate: bool) -> None:
    chance = random.Random(seed)
    events = sorted(
        {(f"u{chance.randrange(12)}", f"i{chance.randrange(15)}", T0 + n) for n in chance.sample(range(500), 110)}
    )
    filters = Filters(user, item, train, iterate)
    expected = {}
    for name, group in pl.DataFrame(
        k_core_by_hand(events, filters), schema=["user", "item", "time"], orient="row"
    ).group_by("user"):
        items = group.sort("time")["item"].to_list()
        if len(items) - 2 >= train:
            expected[name[0]] = (items[:-2], items[-2], items[-1])
    if not expected:
        with pytest.raises(DatasetError, match="nothing is left"):
            sequences_of(events, filters)
        return
    found = all_of(events, filters)
    assert named(found) == expected
    used = {entry for items, valid, test in expected.values() for entry in (*items, valid, test)}
    assert found.item_ids.to_list() == sorted(used)


def test_only_items_of_kept_users_are_numbered() -> None:
    events = [("a", item, T0 + n) for n, item in enumerate("pqrs")] + [("b", "only-b", T0)]
    assert all_of(events).item_ids.to_list() == ["p", "q", "r", "s"]


def test_the_order_of_lines_does_not_matter() -> None:
    events = world(users=40, items=30, events=10)
    first = sequences_of(events)
    chance = random.Random(1)
    for _ in range(3):
        chance.shuffle(events)
        again = sequences_of(events)
        for name in ("items", "times", "offsets", "valid_items", "test_items", "user_keys"):
            assert np.array_equal(getattr(again, name), getattr(first, name)), name
        assert again.user_ids.to_list() == first.user_ids.to_list()


def test_the_order_of_users_is_random_and_seeded() -> None:
    events = [(f"{n:05}", item, T0 + k) for n in range(2000) for k, item in enumerate("abcd")]
    order = np.array(sequences_of(events).user_ids.cast(pl.Int64))
    assert sorted(order.tolist()) == list(range(2000))
    assert abs(np.corrcoef(order, np.arange(2000))[0, 1]) < 0.1
    assert sequences_of(events, seed=1).user_ids.to_list() != [f"{n:05}" for n in order]


def test_ties_follow_neither_item_ids_nor_the_file() -> None:
    """5,000 users with six events at one time: ordered by id or by line, `a` would always come first."""
    events = [(f"u{n}", item, T0) for n in range(5000) for item in "abcdef"]
    sequences = sequences_of(events)
    assert sequences.tied_pairs == 5 * 5000
    ordered = np.column_stack([sequences.items.reshape(5000, 4), sequences.valid_items, sequences.test_items]).astype(
        int
    )
    for position in range(6):
        counts = np.bincount(ordered[:, position], minlength=7)[1:]
        assert ((counts - 5000 / 6) ** 2 / (5000 / 6)).sum() < 26  # chi-square, 5 degrees: p < 1e-4
    rising = (np.diff(ordered, axis=1) > 0).mean()
    assert abs(rising - 0.5) < 0.02
    # Pairs of items keep no fixed order over users, and another seed draws a different order.
    a_before_b = (ordered == 1).argmax(axis=1) < (ordered == 2).argmax(axis=1)
    assert 0.47 < a_before_b.mean() < 0.53
    other = sequences_of(events, seed=1)
    row_of = {user: n for n, user in enumerate(other.user_ids)}
    rows = [row_of[user] for user in sequences.user_ids]
    same = (other.items.reshape(5000, 4)[rows] == sequences.items.reshape(5000, 4)).mean()
    assert 0.13 < same < 0.20


def test_a_tie_does_not_depend_on_other_users() -> None:
    events = [(f"u{n}", item, T0) for n in range(50) for item in "abcdef"]
    whole, part = named(all_of(events)), named(all_of(events[: 6 * 20]))
    assert all(whole[user] == part[user] for user in part)


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        (Filters(min_train=1), r"--min-train 1: a training example needs a history and a target.*at least 2"),
        (Filters(min_user=0), "at least 1"),
        (Filters(min_item=-3), "at least 1"),
    ],
)
def test_impossible_thresholds(tmp_path: Path, filters: Filters, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        prepare(options(write_csv(tmp_path / "r.csv", world()), source="table", filters=filters))


def test_nothing_left_names_the_stages(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "r.csv", world(users=30, items=40, events=12))
    message = r"read: 30 users, 40 items; clean: 30 users, 40 items; k-core: 0 users, 0 items\): lower --min-user"
    with pytest.raises(DatasetError, match=message):
        prepare(table_options(path, min_item=1000))
    with pytest.raises(DatasetError, match=r"min-train: 0 users, 0 items\): lower --min-train"):
        prepare(table_options(path, min_train=11))


def write_5core(directory: Path, rows: dict[str, list[Event]]) -> tuple[Path, ...]:
    header = "user_id,parent_asin,timestamp"
    return tuple(write_csv(directory / f"Things.{split}.csv", rows[split], header) for split in rows)


def with_splits(rows: dict[str, list[Event]]) -> pl.DataFrame:
    frames = [
        pl.DataFrame(events, schema=["user", "item", "time"], orient="row").with_columns(
            split=pl.lit(code, dtype=pl.UInt8)
        )
        for code, events in enumerate(rows.values())
    ]
    return pl.concat(frames)


def five_core() -> dict[str, list[Event]]:
    """Users u0..u4 with train a..e, valid f, test g; and two odd users.

    `odd` has its valid item seen once (dropped by the item filter) and keeps its test item.
    `few` has only four train items left once its rare one is gone.
    """
    train = [(f"u{n}", item, T0 + k) for n in range(5) for k, item in enumerate("abcde")]
    train += [("odd", item, T0 + k) for k, item in enumerate("abcde")]
    train += [("few", item, T0 + k) for k, item in enumerate(["a", "b", "c", "d", "rare1"])]
    valid = [(f"u{n}", "f", T0 + 10) for n in range(5)] + [("odd", "rare2", T0 + 10), ("few", "f", T0 + 10)]
    test = [(f"u{n}", "g", T0 + 11) for n in range(5)] + [("odd", "g", T0 + 11), ("few", "g", T0 + 11)]
    return {"train": train, "valid": valid, "test": test}


def test_amazon5core_follows_the_papers_code(tmp_path: Path) -> None:
    rows = five_core()
    reviews = write_5core(tmp_path, rows)
    _, meta = write_amazon(tmp_path / "meta", [event for split in rows.values() for event in split])
    given = options(reviews, meta, source="amazon5core", negatives=1, title_negatives=1)
    with pytest.raises(DatasetError, match=r"leaves only 0 to draw from: lower --negatives to at most 0"):
        prepare(given)
    # A second group of users on other items leaves something to draw from.
    rows = {
        split: [*events, *(("x" + user, item.upper(), time) for user, item, time in events)]
        for split, events in rows.items()
    }
    reviews = write_5core(tmp_path, rows)
    _, meta = write_amazon(tmp_path / "meta", [], titles_of([e for split in rows.values() for e in split]))
    manifest = build(tmp_path / "out", given)
    found = read_named(tmp_path / "out", manifest)
    assert set(found) == {f"{x}{user}" for x in ("", "x") for user in ("u0", "u1", "u2", "u3", "u4", "odd")}
    assert found["u3"] == {"train": list("abcde"), "valid": ["f"], "test": ["g"]}
    assert found["odd"] == {"train": list("abcde"), "valid": [], "test": ["g"]}
    statistics = manifest.statistics
    assert (statistics.users_with_valid, statistics.users_with_test) == (10, 12)
    assert statistics.interactions == 2 * (5 * 7 + 6)


def test_amazon5core_iterated_drops_what_falls_below() -> None:
    rows = five_core()
    rows["train"] += [("late", item, T0 + k) for k, item in enumerate(["p", "q", "r", "s", "a"])]
    frame = with_splits(rows)
    once = built(frame, Filters())[1]
    again = built(frame, Filters(iterate=True))[1]
    assert [stage.users for stage in once] == [8, 6]
    assert [stage.users for stage in again] == [7, 6]  # `late` has one event left after the item filter


def test_one_event_in_two_splits_counts_in_the_later_one() -> None:
    rows = five_core()
    rows["train"].append(("u0", "g", T0 + 11))
    sequences, _, found = built(with_splits(rows), Filters())
    assert found.duplicates == 1
    assert named(sequences)["u0"] == (list("abcde"), "f", "g")


def test_a_given_split_out_of_time_order_is_counted() -> None:
    rows = five_core()
    rows["valid"][0] = ("u0", "f", T0 + 1)
    rows["test"][1] = ("u1", "g", T0 + 9)
    assert built(with_splits(rows), Filters())[0].together().users_out_of_order == 2
    assert sequences_of(world()).users_out_of_order == 0


def test_a_given_split_with_two_test_items_is_refused(tmp_path: Path) -> None:
    rows = five_core()
    rows["test"].append(("u2", "a", T0 + 12))
    given = options(write_5core(tmp_path, rows), source="amazon5core", missing_title="official")
    with pytest.raises(DatasetError, match="user 'u2' has several test events"):
        prepare(given)
