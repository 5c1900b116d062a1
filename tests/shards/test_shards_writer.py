import random
import tarfile
from pathlib import Path

import polars as pl
import pyarrow as pa
import pytest
from shards_helpers import all_bytes, options, read_users, table_options, world, write_amazon, write_csv

from shards.build import build, prepare
from shards.manifest import DatasetError
from shards.record_schema import RECORD_SCHEMA
from shards.writing.writer import USERS_PER_SHARD, plan_layout


def test_shards_read_back_as_they_were_prepared(tmp_path: Path) -> None:
    reviews, meta = write_amazon(tmp_path, world(users=53))
    given = options(reviews, meta, shards=4, users_per_record=5)
    sequences = prepare(given).sequences
    manifest = build(tmp_path / "out", given)
    users = read_users(tmp_path / "out", manifest)
    assert list(users) == list(range(53))
    for user, stored in users.items():
        train = slice(sequences.offsets[user], sequences.offsets[user + 1])
        assert stored.items == sequences.items[train].tolist()
        assert stored.times == sequences.times[train].tolist()
        assert stored.valid == (sequences.valid_items[user], sequences.valid_times[user])
        assert stored.test == (sequences.test_items[user], sequences.test_times[user])
    names = pl.read_parquet(tmp_path / "out/users.parquet")
    assert names.schema == {"user": pl.Int32, "raw_id": pl.String}
    assert names["user"].to_list() == list(range(53))
    assert names["raw_id"].to_list() == sequences.user_ids.to_list()


def test_layout_of_shards_and_records(tmp_path: Path) -> None:
    reviews, meta = write_amazon(tmp_path, world(users=53))
    manifest = build(tmp_path / "out", options(reviews, meta, shards=4, users_per_record=5))
    assert [(s.first_user, s.users, s.records) for s in manifest.shards] == [
        (0, 13, 3),
        (13, 13, 3),
        (26, 13, 3),
        (39, 14, 3),
    ]
    record = 0
    for shard in manifest.shards:
        with tarfile.open(tmp_path / "out" / shard.name) as tar:
            for position, member in enumerate(tar):
                assert member.name == f"{record:08d}.arrow"
                assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
                assert member.mode == 0o644
                assert member.isreg()
                content = tar.extractfile(member)
                assert content is not None
                table = pa.ipc.open_stream(content).read_all()
                assert table.schema == RECORD_SCHEMA
                assert len(table.to_batches()) == 1
                assert table["user"][0].as_py() == shard.first_user + position * manifest.users_per_record
                record += 1
    assert record == sum(shard.records for shard in manifest.shards)


def test_webdataset_reads_the_shards(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    reviews, meta = write_amazon(tmp_path, world())
    manifest = build(tmp_path / "out", options(reviews, meta, shards=2, users_per_record=4))
    urls = [str(tmp_path / "out" / shard.name) for shard in manifest.shards]
    found = []
    for sample in webdataset.WebDataset(urls, shardshuffle=False):
        found += pa.ipc.open_stream(sample["arrow"]).read_all()["user"].to_pylist()
    assert found == list(range(30))


def test_layout_defaults() -> None:
    assert plan_layout(943, None, None).bounds == (0, 943)
    assert plan_layout(943, None, None).users_per_record == 943
    large = plan_layout(1_000_000, None, None)
    assert len(large.bounds) - 1 == 16
    assert max(b - a for a, b in zip(large.bounds, large.bounds[1:], strict=False)) <= USERS_PER_SHARD
    assert large.users_per_record == 1024
    assert plan_layout(10, 10, None).users_per_record == 1


@pytest.mark.parametrize(
    ("shards", "per_record", "message"),
    [
        (31, None, "--shards 31 for 30 users: lower --shards to at most 30"),
        (0, None, "--shards 0: give at least 1"),
        (None, 0, "--users-per-record 0: give at least 1"),
    ],
)
def test_impossible_layouts(shards: int | None, per_record: int | None, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        plan_layout(30, shards, per_record)


@pytest.mark.parametrize("source", ["amazon2023", "table"])
def test_the_same_input_in_any_order_gives_the_same_bytes(tmp_path: Path, source: str) -> None:
    events = world(users=40)
    events += events[:7]
    found = []
    for attempt in range(3):
        random.Random(attempt).shuffle(events)
        folder = tmp_path / str(attempt)
        folder.mkdir()
        if source == "table":
            given = table_options(write_csv(folder / "r.csv", events), shards=3)
        else:
            reviews, meta = write_amazon(folder, events)
            lines = meta.read_text().splitlines()
            random.Random(attempt).shuffle(lines)
            meta.write_text("\n".join(lines))
            given = options(reviews, meta, shards=3)
        build(folder / "out", given)
        found.append(all_bytes(folder / "out"))
    assert found[0] == found[1] == found[2]
    assert b'"duplicate_events": 7' in found[0]["manifest.json"]
    assert str(tmp_path).encode() not in b"".join(found[0].values())


def test_another_seed_gives_other_bytes(tmp_path: Path) -> None:
    reviews, meta = write_amazon(tmp_path, world())
    one = build(tmp_path / "one", options(reviews, meta))
    two = build(tmp_path / "two", options(reviews, meta, seed=1))
    assert one.fingerprint != two.fingerprint
    assert one.catalog_sha256 == two.catalog_sha256
