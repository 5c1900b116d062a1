"""Builds in parts on disk give the bytes of a build in memory, and leave nothing behind."""

import dataclasses
import logging
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from shards_helpers import Event, all_bytes, options, titles_of, world, write_amazon, write_csv

import shards.build
from shards.build import build
from shards.manifest import DatasetError
from shards.partitions import local
from shards.partitions.local import LocalEngine, local_engine
from shards.partitions.parts import LocalParts, Pool, run_in_order
from shards.partitions.temporal import TemporalSplit
from shards.sequences import Sequences, join, regrouped


def events_of_many(seed: int = 0) -> list[Event]:
    """Users of 6 to 14 events, of which some have bad times, are repeated or share their times."""
    events = [*world(users=150, items=60, events=12, seed=seed), *world(users=40, items=90, events=6, seed=seed + 1)]
    chance = random.Random(seed)
    events += chance.sample(events, 50)
    events += [(f"user-{n}", "item-1", 0) for n in range(7)]
    chance.shuffle(events)
    return events


def in_parts(monkeypatch: pytest.MonkeyPatch, limit: int, pool_bytes: int = 1 << 30) -> None:
    """Let builds hold at most `limit` events in memory, and use a pool for input of `pool_bytes`."""
    monkeypatch.setattr(shards.build, "local_engine", partial(local_engine, limit=limit, pool_bytes=pool_bytes))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"iterate": True, "min_item": 20},
        {"ties": "file", "seed": 3},
        {"missing_title": "drop"},
        {"user_fraction": 0.5, "shards": 3, "users_per_record": 7},
        {"temporal": TemporalSplit(quantile=0.7, target="random"), "min_train": 2},
        {"temporal": TemporalSplit(validation="last-train-item"), "min_train": 2},
        {"temporal": TemporalSplit(target="successive", validation="by-user", validation_users=7), "min_train": 2},
    ],
    ids=str,
)
def test_parts_on_disk_give_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    events = events_of_many()
    titles = titles_of(events[: 1 if "missing_title" not in changes else 300])
    paths = [write_csv(tmp_path / f"{part}.csv", events[part::3]) for part in range(3)]
    meta = write_csv(tmp_path / "meta.csv", [(item, title, "") for item, title in titles.items()], "item,title,brand")
    given = options(
        tuple(paths), meta, **{"source": "table", "missing_title": "official", "bad_times": "drop", **changes}
    )
    whole = build(tmp_path / "whole", given)
    in_parts(monkeypatch, limit=400)
    again = build(tmp_path / "parts", given)
    assert again.fingerprint == whole.fingerprint
    assert all_bytes(tmp_path / "parts") == all_bytes(tmp_path / "whole")


def test_processes_give_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    events = events_of_many()
    paths = tuple(write_csv(tmp_path / f"{part}.csv", events[part::3]) for part in range(3))
    empty = write_csv(tmp_path / "empty.csv", [])
    usual = options((*paths, empty), source="table", missing_title="official", bad_times="drop", missing_ids="drop")
    given = dataclasses.replace(usual, user_fraction=0.9)
    in_order = options(paths, source="table", missing_title="official", bad_times="drop", ties="file")
    expected = [build(tmp_path / f"alone-{number}", each) for number, each in enumerate((given, in_order))]
    in_parts(monkeypatch, limit=500, pool_bytes=0)
    pools: list[Pool | None] = []

    class Watched(LocalParts[Any]):
        def __init__(self, parts: Sequence[Any], pool: Pool | None = None) -> None:
            pools.append(pool)
            super().__init__(parts, pool)

    monkeypatch.setattr(local, "LocalParts", Watched)
    caplog.set_level(logging.INFO, "shards")
    caplog.clear()
    for number, each in enumerate((given, in_order)):
        found = build(tmp_path / f"shared-{number}", each, workers=2)
        assert found.fingerprint == expected[number].fingerprint
        assert all_bytes(tmp_path / f"shared-{number}") == all_bytes(tmp_path / f"alone-{number}")
    assert [pool and pool.processes for pool in pools] == [2, 2]
    assert sum("users outside --user-fraction" in line for line in caplog.messages) == 1, "one line for all files"
    assert not multiprocessing.active_children()
    with pytest.raises(DatasetError, match="--workers 0: give at least 1"):
        build(tmp_path / "bad", given, workers=0)


def test_bad_input_and_lost_processes_of_a_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = write_csv(tmp_path / "good.csv", events_of_many())
    bad = write_csv(tmp_path / "bad.csv", [("", "item-1", 1_500_000_000_000)])
    empty = [write_csv(tmp_path / f"empty-{number}.csv", []) for number in range(2)]
    in_parts(monkeypatch, limit=500, pool_bytes=0)
    for paths, message in (((good, bad), "1 events have no user id"), (tuple(empty), "no events in")):
        for workers in (1, 2):
            with pytest.raises(DatasetError, match=message):
                build(tmp_path / "out", options(paths, source="table"), workers=workers)
    dying: list[Callable[[], object]] = [partial(os._exit, 1), os.getpid]
    killed = pytest.raises(DatasetError, match=r"a process of the build was killed, .* lower --workers")
    with local_engine(tmp_path, 2, (good,), pool_bytes=0) as engine, killed:
        list(run_in_order(engine._pool, dying, "dying"))
    assert not multiprocessing.active_children()
    # A task that runs is not waited for.
    tasks: list[Callable[[], object]] = [os.getpid, partial(time.sleep, 3600)]

    def interrupted(engine: LocalEngine) -> None:
        for _ in run_in_order(engine._pool, tasks, "sleeping"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), local_engine(tmp_path, 2, (good,), pool_bytes=0) as engine:
        interrupted(engine)
    assert not multiprocessing.active_children()


def test_a_given_split_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: dict[str, list[Event]] = {"train": [], "valid": [], "test": []}
    for user in range(80):
        for place in range(9):
            split = {7: "valid", 8: "test"}.get(place, "train")
            rows[split].append((f"u{user}", f"i{(user * 3 + place * 5) % 31}", 1_500_000_000_000 + place // 2))
    header = "user_id,parent_asin,timestamp"
    paths = tuple(write_csv(tmp_path / f"x.{split}.csv", rows[split], header) for split in rows)
    given = options(paths, source="amazon5core", missing_title="official")
    whole = build(tmp_path / "whole", given)
    in_parts(monkeypatch, limit=100)
    assert build(tmp_path / "parts", given).fingerprint == whole.fingerprint
    rows["test"].append(("u5", "i1", 1_500_000_000_000))
    write_csv(paths[2], rows["test"], header)
    with pytest.raises(DatasetError, match="user 'u5' has several test events"):
        build(tmp_path / "bad", given)
    with pytest.raises(DatasetError, match="the source is split already"):
        build(tmp_path / "bad", options(paths, source="amazon5core", temporal=TemporalSplit()))


def test_an_error_in_parts_is_that_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = options(write_csv(tmp_path / "r.csv", events_of_many()), source="table", missing_title="official")
    with pytest.raises(DatasetError) as whole:
        build(tmp_path / "out", given)
    in_parts(monkeypatch, limit=300)
    with pytest.raises(DatasetError) as parts:
        build(tmp_path / "out", given)
    assert str(parts.value) == str(whole.value)
    assert "7 events have a missing, zero or negative time, such as user 'user-0'" in str(whole.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.csv"]


_STOPPED = """
import functools, signal, sys, time
import shards.build
from shards.__main__ import main
signal.signal(signal.SIGTERM, signal.default_int_handler)
shards.build.local_engine = functools.partial(shards.build.local_engine, limit=200)
shards.build.measure = lambda *_, **__: (print("now", flush=True), time.sleep(60))
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.process
def test_a_stopped_build_leaves_no_parts(tmp_path: Path) -> None:
    reviews, meta = write_amazon(tmp_path / "input", world(users=80))
    command = ["build", str(tmp_path / "out"), "--source", "amazon2023", "--reviews", str(reviews), "--meta", str(meta)]
    process = subprocess.Popen(
        [sys.executable, "-c", _STOPPED, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "now\n"
    [unfinished] = tmp_path.glob(".out.partial-*")
    assert list((unfinished / ".parts").glob("part-*"))
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted: nothing was written" in errors
    assert [path.name for path in tmp_path.iterdir()] == ["input"]


def test_users_regrouped_across_parts() -> None:
    rng = np.random.default_rng(0)
    offsets = np.concatenate([[0], np.cumsum(rng.integers(0, 5, 20))])
    events = int(offsets[-1])
    held_out, at = rng.integers(0, 9, 20, np.int32), rng.integers(1, 9, 20)
    whole = Sequences(
        pl.Series([f"u{n}" for n in range(20)]),
        rng.integers(0, 99, 20).astype(np.uint64),
        offsets,
        rng.integers(1, 9, events, np.int32),
        rng.integers(1, 99, events),
        held_out,
        at,
        held_out,
        at,
        tied_pairs=0,
    )

    def cut(bounds: list[int]) -> Iterator[Sequences]:
        return regrouped([whole], bounds)

    parts = list(cut([0, 1, 8, 9, 20]))
    assert [part.first_user for part in parts] == [0, 1, 8, 9]
    for bounds in ([0, 20], [0, 9, 20], [0, 3, 4, 16, 20]):
        found = list(regrouped(parts, bounds))
        for part, expected in zip(found, cut(bounds), strict=True):
            assert part.first_user == expected.first_user
            assert part.user_ids.equals(expected.user_ids)
            for name in ("user_keys", "offsets", "items", "times", "valid_items", "test_times"):
                assert np.array_equal(getattr(part, name), getattr(expected, name)), name
        assert np.array_equal(join(found).items, whole.items)
