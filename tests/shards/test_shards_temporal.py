"""The temporal split against the rule of *Time to Split* (gh:monkey0head/time-to-split) in plain Python."""

from __future__ import annotations

import io
import math
import random
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from shards_helpers import table_options, write_csv

from shards.__main__ import main
from shards.build import build
from shards.manifest import DatasetError, read_manifest
from shards.partitions.temporal import Target, TemporalSplit, Validation
from shards.stored.records import read_batches
from shards.stored.users import read_stored
from trainer.data.raw.users import find_users
from trainer.data.reading.dataset import open_dataset
from trainer.data.reading.histories import Users
from trainer.data.reading.shards import read_in_order, read_users

Event = tuple[str, str, int]


def small_log(users: int = 40, seed: int = 0) -> list[Event]:
    """Users who come and go; every time is different, so that the order is the same everywhere."""
    chance = random.Random(seed)
    times = chance.sample(range(1_500_000_000_000, 1_600_000_000_000), users * 12)
    log = []
    for user in range(users):
        span = sorted(chance.sample(range(24), 2))
        for time in sorted(times)[user::users]:
            if span[0] * 4_200_000_000 <= time - 1_500_000_000_000 <= (span[1] + 6) * 4_200_000_000:
                log.append((f"user-{user}", f"item-{chance.randrange(30)}", time))
    return log


class Expected(NamedTuple):
    """Events of each user (item, time) by part."""

    train: dict[str, list[tuple[str, int]]]
    valid: dict[str, list[tuple[str, int]]]
    """History and target, which is the last."""
    test: dict[str, list[tuple[str, int]]]
    time: float


def at_time(log: dict[str, list[tuple[str, int]]], quantile: float) -> tuple[dict[str, Any], dict[str, Any], float]:
    """`GlobalTimeSplitter.split_by_time`: train of users whose second event is early; whole histories of late users."""
    threshold = float(np.quantile([time for events in log.values() for _, time in events], quantile))
    train_users = [user for user, events in log.items() if len(events) > 1 and events[1][1] <= threshold]
    train = {user: [event for event in log[user] if event[1] <= threshold] for user in train_users}
    test = {user: events for user, events in log.items() if events[-1][1] > threshold}
    return train, test, threshold


def time_to_split(log: Sequence[Event], validation: Validation, target: Target, left_out: set[str]) -> Expected:
    """Their split.

    Args:
        left_out: users who validate by user, whom they draw at random.
    """
    by_user: dict[str, list[tuple[str, int]]] = {}
    for user, item, time in sorted(log, key=lambda event: event[2]):
        by_user.setdefault(user, []).append((item, time))
    train, test, threshold = at_time(by_user, 0.9)
    earlier = threshold
    if validation == "by-time":
        train, valid, earlier = at_time(train, 0.9)
    elif validation == "by-user":
        valid = {user: events for user, events in train.items() if user in left_out}
        train = {user: events for user, events in train.items() if user not in left_out}
    else:
        valid = {user: events for user, events in train.items() if len(events) > 1}
        train = {user: events[:-1] for user, events in train.items() if len(events) > 2}

    def cut(events: list[tuple[str, int]], after: float) -> list[tuple[str, int]]:
        """A history up to its target: the first later event, or the last."""
        return (
            events
            if target == "last"
            else [event for event in events if event[1] <= after]
            + [next(event for event in events if event[1] > after)]
        )

    # Their evaluation leaves out users who are not in training (`remove_cold`); by user, those who validate are there.
    known = {*train, *left_out}
    return Expected(
        train,
        {u: cut(e, earlier) if validation == "by-time" else e for u, e in valid.items() if u in known},
        {u: cut(e, threshold) for u, e in test.items() if u in known},
        threshold,
    )


def options(path: Path, **values: Any) -> Any:
    return table_options(path, min_user=1, min_item=1, min_train=2, temporal=TemporalSplit(**values))


def named(folder: Path, users: Users, row: int) -> str:
    raw = pl.read_parquet(folder / "users.parquet")
    return str(raw.filter(pl.col("user") == int(users.train.user_U[row]))["raw_id"][0])


@pytest.mark.parametrize("validation", ["by-time", "by-user", "last-train-item"])
@pytest.mark.parametrize("target", ["last", "first"])
def test_a_small_log_is_split_like_theirs(tmp_path: Path, validation: Validation, target: Target) -> None:
    log = small_log()
    by_user = {"validation_users": 6} if validation == "by-user" else {}
    path = write_csv(tmp_path / "log.csv", log)
    build(tmp_path / "out", options(path, validation=validation, target=target, **by_user))
    manifest = read_manifest(tmp_path / "out")
    assert manifest.is_temporal
    [users] = read_in_order(tmp_path / "out", manifest)
    left_out = {named(tmp_path / "out", users, row) for row in np.flatnonzero(users.train.length_U == 0).tolist()}
    assert len(left_out) == manifest.num_users - manifest.num_train_users == len(by_user) * 6
    expected = time_to_split(log, validation, target, left_out)
    assert manifest.build["split_time"] == math.floor(expected.time)
    assert manifest.build["split_target"] == target
    raw = ["", *pl.read_parquet(tmp_path / "out" / "catalog.parquet").sort("item")["raw_id"].to_list()]

    def listed(split: str) -> dict[str, list[tuple[str, int]]]:
        if split == "train":
            histories, target_U = users.train, None
        else:
            histories, target_U = users.targets("valid" if split == "valid" else "test")
        found = {}
        for row in range(len(histories)):
            one = histories.take(slice(row, row + 1))
            events = [(raw[item], time) for item, time in zip(one.item_E.tolist(), one.time_E.tolist(), strict=True)]
            user = int(one.user_U[0])
            if target_U is not None:
                time_U = users.valid_time_U if split == "valid" else users.test_time_U
                events.append((raw[target_U[row]], int(time_U[user])))
            if events:
                found[named(tmp_path / "out", users, user)] = events
        return found

    assert listed("train") == expected.train
    assert listed("valid") == expected.valid
    assert listed("test") == expected.test
    assert len(expected.test) > 5
    assert len(expected.valid) > 3
    assert len(expected.train) > len(expected.test), "users without a later event train too"


def test_training_never_sees_the_test(tmp_path: Path) -> None:
    build(tmp_path / "out", options(write_csv(tmp_path / "log.csv", small_log()), target="random"))
    manifest = read_manifest(tmp_path / "out")
    [users] = read_in_order(tmp_path / "out", manifest)
    split_time, valid_time = manifest.build["split_time"], manifest.build["split_valid_time"]
    assert isinstance(split_time, int)
    assert isinstance(valid_time, int)
    assert users.train.time_E.max() <= valid_time
    has_valid, has_test = users.valid_item_U > 0, users.test_item_U > 0
    assert (users.valid_time_U[has_valid] > valid_time).all()
    assert (users.valid_time_U[has_valid] <= split_time).all()
    assert (users.test_time_U[has_test] > split_time).all()
    whole = users.whole()
    row_E = np.repeat(np.arange(len(users)), whole.length_U)
    assert ((np.diff(whole.time_E) > 0) | (np.diff(row_E) > 0)).all(), "every history is in time order"
    stored = next(iter(read_stored(tmp_path / "out", manifest)))
    assert stored.item_E.tolist() == whole.item_E.tolist(), "the builder's own reader sees the same histories"
    assert manifest.statistics.interactions == len(whole.item_E)
    negative_UC = open_dataset(tmp_path / "out", full_check=True).candidates("retrieval", "test")
    for row in range(len(users)):
        assert not set(negative_UC[row]) & set(whole.take(slice(row, row + 1)).item_E.tolist())
    user_U = find_users(tmp_path / "out", [named(tmp_path / "out", users, 3)])
    one = read_users(tmp_path / "out", manifest, user_U).whole()
    assert one.item_E.tolist() == whole.take(slice(3, 4)).item_E.tolist()


def test_successive_targets_are_all_later_events(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "log.csv", small_log())
    build(tmp_path / "last", options(path, target="last"))
    build(tmp_path / "out", options(path, target="successive"))
    manifest = read_manifest(tmp_path / "out")
    [one], [users] = (read_in_order(tmp_path / name, read_manifest(tmp_path / name)) for name in ("last", "out"))
    whole, split_time = users.whole(), manifest.build["split_time"]
    assert isinstance(split_time, int)
    assert whole.item_E.tolist() == one.whole().item_E.tolist()
    expected = []
    for row in np.flatnonzero(users.test_item_U):
        history = whole.take(slice(row, row + 1))
        later = np.flatnonzero(history.time_E > split_time)
        expected += [(row, history.item_E[:place].tolist(), history.item_E[place]) for place in later]
    for dated in (users, users.dated("last"), Users.concatenate([users.take(slice(9)), users.take(slice(9, None))])):
        histories, target_T = dated.targets("test")
        found = [histories.take(slice(row, row + 1)).item_E.tolist() for row in range(len(histories))]
        assert list(zip(histories.user_U, found, target_T, strict=True)) == expected
    assert len(expected) == manifest.build["split_test_targets"]
    assert len(expected) > manifest.statistics.users_with_test
    assert users.targets("valid")[1].tolist() == one.targets("valid")[1].tolist(), "validation keeps one target"


def test_random_targets_depend_on_the_seed_alone(tmp_path: Path) -> None:
    log = small_log()
    path, mixed = write_csv(tmp_path / "log.csv", log), write_csv(tmp_path / "mixed.csv", log[::-1])
    first = build(tmp_path / "a", options(path, target="random"))
    assert build(tmp_path / "b", options(mixed, target="random")).fingerprint == first.fingerprint
    other = table_options(path, min_user=1, min_item=1, min_train=2, temporal=TemporalSplit(target="random"), seed=1)
    assert build(tmp_path / "c", other).fingerprint != first.fingerprint


def test_options_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_csv(tmp_path / "log.csv", small_log())
    words = ["build", str(tmp_path / "out"), "--source", "table", "--reviews", str(path), "--missing-title", "official"]
    words += ["--time-unit", "ms", "--min-user", "1", "--min-item", "1", "--min-train", "2"]
    words += ["--negatives", "3", "--title-negatives", "3"]
    assert main([*words, "--split", "temporal", "--quantile", "0.8", "--validation", "last-train-item"]) == 0
    assert main(["stats", str(tmp_path / "out"), "--order"]) == 0
    assert "later than the median test event" not in capsys.readouterr().out, "nothing leaks"
    found = read_manifest(tmp_path / "out").build
    assert (found["split_quantile"], found["split_validation"], found["split_valid_time"]) == (
        0.8,
        "last-train-item",
        None,
    )
    for wrong, message in (
        (["--quantile", "0.8"], "--quantile is for --split temporal only"),
        (["--split", "temporal", "--quantile", "1"], "--quantile 1.0: give a number between 0 and 1"),
        (["--split", "temporal", "--validation-users", "9"], "--validation-users is for --validation by-user only"),
        (
            ["--split", "temporal", "--validation", "by-user"],
            "--validation-users 500: only 35 users have more than --min-train events",
        ),
        (
            ["--split", "temporal", "--validation", "by-user", "--validation-users", "0"],
            "--validation-users 0: give at least 1",
        ),
    ):
        assert main([*words, "--overwrite", *wrong]) == 2
        assert message in capsys.readouterr().err


def test_times_that_cannot_be_divided_name_the_cure(tmp_path: Path) -> None:
    log = [(user, item, 1_500_000_000_000) for user, item, _ in small_log()]
    unique = sorted(set(log))
    with pytest.raises(DatasetError, match=r"nothing is left .* lower --min-train"):
        build(
            tmp_path / "out",
            table_options(
                write_csv(tmp_path / "few.csv", small_log()),
                min_user=1,
                min_item=1,
                min_train=50,
                temporal=TemporalSplit(),
            ),
        )
    with pytest.raises(DatasetError, match=r"is late enough .* lower --quantile"):
        build(tmp_path / "out", options(write_csv(tmp_path / "log.csv", unique)))


def test_other_manifests_have_no_word_of_it(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "log.csv", small_log())
    manifest = build(tmp_path / "out", table_options(path, min_user=1, min_item=1, min_train=2))
    assert not manifest.is_temporal
    assert not [key for key in manifest.build if key.startswith("split")]


def test_contexts_with_unknown_items_are_refused(tmp_path: Path) -> None:
    build(tmp_path / "out", options(write_csv(tmp_path / "log.csv", small_log())))
    manifest = read_manifest(tmp_path / "out")
    assert next(read_in_order(tmp_path / "out", manifest)).test_context is not None
    path = tmp_path / "out" / "shard-000000.tar"
    [batch] = read_batches(path)
    column = batch.column("test_context_items")
    values = column.values.to_numpy().copy()
    values[0] = manifest.num_items + 1
    broken = pa.ListArray.from_arrays(column.offsets, pa.array(values, pa.int32()))
    batch = batch.set_column(batch.schema.get_field_index("test_context_items"), "test_context_items", broken)
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, batch.schema) as stream:
        stream.write_batch(batch)
    with tarfile.open(path, "w") as tar:
        member = tarfile.TarInfo("00000000.arrow")
        member.size = len(sink.getvalue())
        tar.addfile(member, io.BytesIO(sink.getvalue()))
    with pytest.raises(DatasetError, match="does not hold the users and items that the manifest says"):
        next(read_in_order(tmp_path / "out", manifest))
