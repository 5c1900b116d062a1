import gzip
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from shards_helpers import options, write_amazon, write_csv

from shards.build import prepare
from shards.formats import textfiles
from shards.formats.textfiles import line_blocks
from shards.manifest import DatasetError
from shards.partitions.blocks import encode
from shards.partitions.clean import check_times, cleaned
from shards.partitions.parts import LocalParts
from shards.readers.reviews import SPLITS, read_events
from shards.readers.sources import Columns

T0 = 1_500_000_000_000


def read(source: str, *paths: Path, fraction: float = 1.0, seed: int = 0, **columns: Any) -> pl.DataFrame:
    return pl.concat(read_events(source, paths, Columns(**columns), user_fraction=fraction, seed=seed))


def rows(events: pl.DataFrame) -> list[tuple[object, ...]]:
    """Events in a fixed order."""
    found = [
        (row["user"], row["item"], row["time"]) + ((SPLITS[row["split"]],) if "split" in row else ())
        for row in events.to_dicts()
    ]
    return sorted(found)


def test_amazon2023_gzip_and_plain(tmp_path: Path) -> None:
    events = [("b", "y", T0), ("a", "x", T0 + 1), ("a", "z", T0 + 2)]
    reviews, _ = write_amazon(tmp_path, events)
    plain = tmp_path / "plain.jsonl"
    plain.write_bytes(gzip.decompress(reviews.read_bytes()).replace(b"\n", b"\r\n\n"))
    assert rows(read("amazon2023", reviews)) == sorted(events)
    assert rows(read("amazon2023", plain)) == sorted(events)
    assert rows(read("amazon2023", reviews, plain)) == sorted(events * 2)


def test_ids_are_coded_in_order(tmp_path: Path) -> None:
    frame = read("table", write_csv(tmp_path / "r.csv", [("é", "9", 1), ("a", "10", 2)]), time_unit="ms")
    events, items = encode(frame)
    assert items.to_list() == ["10", "9"]
    assert sorted(events.users) == ["a", "é"]
    assert events.user_keys.tolist() == sorted(events.user_keys)
    assert events.users.gather(events.frame["user"]).to_list() == ["é", "a"]
    assert items.gather(events.frame["item"]).to_list() == ["9", "10"]


def test_blocks_hold_whole_lines(tmp_path: Path) -> None:
    content = b"".join(b"%d," % n * (n % 40) + b"\n" for n in range(300)) + b"last without newline"
    path = tmp_path / "x"
    path.write_bytes(content)
    for size in (1, 7, 100, 1 << 20):
        blocks = list(line_blocks(path, size))
        assert b"".join(block for _, block in blocks) == content
        assert all(block.endswith(b"\n") for _, block in blocks[:-1])
        lines = [block.count(b"\n") for _, block in blocks]
        assert [first for first, _ in blocks] == [1 + sum(lines[:n]) for n in range(len(blocks))]


def test_small_blocks_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = [(f"u{n % 7}", f"i{n}", T0 + n) for n in range(100)]
    reviews, _ = write_amazon(tmp_path, events)
    table = write_csv(tmp_path / "x.inter", events, "user_id:token,item_id:token,timestamp:float")
    table.write_text(table.read_text().replace(",", "\t"))
    whole = rows(read("amazon2023", reviews)), rows(read("recbole", table, time_unit="ms"))
    monkeypatch.setattr(textfiles.line_blocks, "__defaults__", (50,))
    assert (rows(read("amazon2023", reviews)), rows(read("recbole", table, time_unit="ms"))) == whole


def test_values_that_only_need_a_cast(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(
        f'{{"user_id": "a", "parent_asin": "x", "timestamp": "{T0}"}}\n'
        f'{{"user_id": 7, "parent_asin": "y", "timestamp": {T0}.0}}\n'
    )
    assert rows(read("amazon2023", path)) == [("7", "y", T0), ("a", "x", T0)]


def test_amazon5core_keeps_the_given_split(tmp_path: Path) -> None:
    header = "user_id,parent_asin,rating,timestamp,history"
    for split, line in (("train", "a,x,5.0,1"), ("valid", "a,y,4.0,2"), ("test", "a,z,1.0,3")):
        (tmp_path / f"Latest.{split}.csv").write_text(f"{header}\n{line},p q r\n")
    paths = [tmp_path / f"Latest.{split}.csv" for split in ("test", "train", "valid")]
    assert rows(read("amazon5core", *paths)) == [
        ("a", "x", 1, "train"),
        ("a", "y", 2, "valid"),
        ("a", "z", 3, "test"),
    ]
    for wrong in (paths[:2], [*paths, paths[0]], [paths[0], paths[0], paths[1]]):
        with pytest.raises(DatasetError, match="exactly three files whose names contain train, valid and test"):
            read("amazon5core", *wrong)


def test_recbole_counts_seconds_and_names_columns_with_types(tmp_path: Path) -> None:
    path = tmp_path / "x.inter"
    path.write_text('item_id:token\ttimestamp:float\tuser_id:token\n"q"\t881250949\tu\ny\t881250949.5\tu\n')
    assert rows(read("recbole", path)) == [("u", '"q"', 881_250_949_000), ("u", "y", 881_250_949_500)]


def test_table_in_csv_tsv_and_parquet(tmp_path: Path) -> None:
    events = [("a", "x", 1_500_000_000), ("b", "y", 1_500_000_001)]
    expected = [(user, item, time * 1000) for user, item, time in events]
    csv = write_csv(tmp_path / "r.csv", events, "who,what,when")
    packed = tmp_path / "r.csv.gz"
    packed.write_bytes(gzip.compress(csv.read_bytes()))
    tsv = tmp_path / "r.tsv"
    tsv.write_text(csv.read_text().replace(",", "\t"))
    frame = pl.DataFrame(events, schema=["who", "what", "when"], orient="row")
    frame.write_parquet(tmp_path / "r.parquet")
    dated = frame.with_columns(pl.from_epoch("when", time_unit="s"))
    dated.write_parquet(tmp_path / "date.parquet")
    zoned = dated.with_columns(pl.col("when").dt.replace_time_zone("UTC").dt.convert_time_zone("Asia/Tokyo"))
    zoned.write_parquet(tmp_path / "zone.parquet")
    for name in ("r.csv", "r.csv.gz", "r.tsv", "r.parquet", "date.parquet", "zone.parquet"):
        found = read("table", tmp_path / name, user="who", item="what", time="when", time_unit="s")
        assert rows(found) == expected, name
    assert datetime.fromtimestamp(expected[0][2] / 1000, UTC).year == 2017


def test_whole_numbers_as_ids(tmp_path: Path) -> None:
    frame = pl.DataFrame({"user": [10, 9], "item": [1, 2], "time": [5, 6]})
    frame.write_parquet(tmp_path / "r.parquet")
    assert rows(read("table", tmp_path / "r.parquet", time_unit="ms")) == [("10", "1", 5), ("9", "2", 6)]


@pytest.mark.parametrize("source", ["amazon2023", "amazon5core", "recbole", "table"])
def test_a_missing_file_is_named(tmp_path: Path, source: str) -> None:
    paths = [tmp_path / f"no.{split}.csv" for split in SPLITS]
    with pytest.raises(DatasetError, match=r"no\.train\.csv does not exist: check the path"):
        read(source, *paths, time_unit="ms")
    with pytest.raises(DatasetError, match="is not a file"):
        read(source, tmp_path, time_unit="ms")


def test_truncated_gzip(tmp_path: Path) -> None:
    reviews, _ = write_amazon(tmp_path, [(f"u{n}", f"i{n}", T0 + n) for n in range(2000)])
    content = reviews.read_bytes()
    for name, damaged in (
        ("cut", content[: len(content) // 2]),
        ("flipped", content[:-6] + b"xx" + content[-4:]),
    ):
        path = tmp_path / f"{name}.jsonl.gz"
        path.write_bytes(damaged)
        with pytest.raises(DatasetError, match=r"truncated or damaged gzip file.*download it again"):
            read("amazon2023", path)
        table = tmp_path / f"{name}.csv.gz"
        table.write_bytes(damaged)
        with pytest.raises(DatasetError, match="truncated or damaged gzip"):
            read("table", table, user="user_id", item="parent_asin", time="timestamp", time_unit="ms")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", r"x\.jsonl:3 is not JSON"),
        ("[1, 2]", r"x\.jsonl:3 is not a JSON object"),
        ('{"user_id": "a", "parent_asin": "x", "timestamp": "noon"}', r"x\.jsonl:3 has 'timestamp' = 'noon'"),
        ('{"user_id": "a", "parent_asin": "x", "timestamp": [1]}', r"x\.jsonl:3 has 'timestamp'"),
        ('{"user_id": "a", "timestamp": 1}', "1 events have no item id"),
        ('{"user_id": "", "parent_asin": "x", "timestamp": 1}', "1 events have no user id"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "x.jsonl"
    good = json.dumps({"user_id": "a", "parent_asin": "x", "timestamp": T0})
    path.write_text(f"{good}\n\n{line}\n{good}\n")
    with pytest.raises(DatasetError, match=message):
        read("amazon2023", path)


def test_a_missing_field_lists_the_existing_ones(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"user": "a", "parent_asin": "x", "timestamp": 1}\n' * 3)
    with pytest.raises(DatasetError, match=r"no field 'user_id' \(it has user, parent_asin, timestamp\)"):
        read("amazon2023", path)


def test_a_missing_column_lists_the_existing_ones(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "r.csv", [("a", "x", 1)], "user,item,date")
    with pytest.raises(DatasetError, match=r"no column 'time' \(it has user, item, date\).*--time-column"):
        read("table", path, time_unit="ms")
    pl.read_csv(path).write_parquet(tmp_path / "r.parquet")
    with pytest.raises(DatasetError, match=r"no column 'time' \(it has user, item, date\)"):
        read("table", tmp_path / "r.parquet", time_unit="ms")
    inter = tmp_path / "r.inter"
    inter.write_text("user_id:token\titem_id:token\na\tx\n")
    with pytest.raises(DatasetError, match=r"no column 'timestamp' \(it has user_id, item_id\)"):
        read("recbole", inter)
    with pytest.raises(DatasetError, match="three different ones"):
        read("table", path, user="item", item="item", time="date", time_unit="ms")


def test_files_of_the_wrong_kind(tmp_path: Path) -> None:
    binary = tmp_path / "x.parquet"
    binary.write_bytes(b"PAR1" + bytes(100))
    with pytest.raises(DatasetError, match="not a readable parquet file"):
        read("table", binary, time_unit="ms")
    (tmp_path / "x.csv.zip").write_bytes(b"PK\x03\x04" + bytes(30))
    with pytest.raises(DatasetError, match="is a zip archive: unpack it"):
        read("table", tmp_path / "x.csv.zip", time_unit="ms")
    (tmp_path / "x.json").write_text('[{"user": "a", "item": "x", "time": 1}]')
    with pytest.raises(DatasetError, match="is one JSON list: write one object a line"):
        read("table", tmp_path / "x.json", time_unit="ms")
    (tmp_path / "x.jsonl").write_text("<html><body>403 Forbidden</body></html>")
    with pytest.raises(DatasetError, match="is a web page, not data"):
        read("amazon2023", tmp_path / "x.jsonl")
    for source, name in (("amazon2023", "e.jsonl"), ("recbole", "e.inter"), ("table", "e.csv")):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(DatasetError, match="is empty"):
            read(source, tmp_path / name, time_unit="ms")
    ragged = tmp_path / "ragged.inter"
    ragged.write_text("user_id:token\titem_id:token\ttimestamp:float\na\tx\t1\na\tx\t1\t2\t3\n")
    with pytest.raises(DatasetError, match=r"ragged\.inter:3 cannot be split into 3 columns"):
        read("recbole", ragged)
    short = tmp_path / "short.inter"
    short.write_text("user_id:token\titem_id:token\ttimestamp:float\na\tx\n")
    with pytest.raises(DatasetError, match=r"short\.inter:2 cannot be split into 3 columns"):
        read("recbole", short)


def test_times_need_the_right_unit(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "r.csv", [("a", "x", T0)])
    assert rows(read("table", path)) == [("a", "x", T0)]
    with pytest.raises(DatasetError, match="numbers such as 7, which are not times between 1973 and 2100 in any unit"):
        read("table", write_csv(tmp_path / "n.csv", [("a", "x", 7)]))
    with pytest.raises(DatasetError, match="after the year 2100: set --time-unit ms"):
        read("table", path, time_unit="s")
    with pytest.raises(DatasetError, match="'yesterday' is not a time"):
        read("table", write_csv(tmp_path / "w.csv", [("a", "x", "yesterday")]), time_unit="s")
    pl.DataFrame({"user": ["a"], "item": ["x"], "time": [[1]]}).write_parquet(tmp_path / "l.parquet")
    with pytest.raises(DatasetError, match="times are List"):
        read("table", tmp_path / "l.parquet", time_unit="s")
    pl.DataFrame({"user": [["a"]], "item": ["x"], "time": [1]}).write_parquet(tmp_path / "u.parquet")
    with pytest.raises(DatasetError, match="user ids are List"):
        read("table", tmp_path / "u.parquet", time_unit="s")
    micro = tmp_path / "micro.jsonl"
    micro.write_text(json.dumps({"user_id": "a", "parent_asin": "x", "timestamp": T0 * 1000}))
    assert rows(read("amazon2023", micro)) == [("a", "x", T0)]
    with pytest.raises(DatasetError, match="after the year 2100: set --time-unit us"):
        read("amazon2023", micro, time_unit="ms")


@pytest.mark.parametrize("bad", ["0", "-5", "", "-9e300", "nan", str(-(2**62))])
def test_bad_times(tmp_path: Path, bad: str) -> None:
    path = write_csv(tmp_path / "r.csv", [("a", "x", T0 // 1000), ("u1", "i1", bad), ("b", "y", 7)])
    events, items = encode(read("table", path, time_unit="s"))
    parts, found = cleaned(LocalParts([events]), items, seed=0)
    with pytest.raises(DatasetError, match=r"1 events .* user 'u1' with item 'i1' at .*--bad-times drop"):
        check_times(found, "error", "s")
    check_times(found, "drop", "s")
    assert found.bad_times == 1
    [kept] = parts
    user, item = kept.users.gather(kept.frame["user"]), items.gather(kept.frame["item"])
    named = kept.frame.select(user.alias("user"), item.alias("item"), "time")
    assert rows(named) == [("a", "x", T0), ("b", "y", 7000)]


def test_user_sampling_is_seeded_and_keeps_whole_users(tmp_path: Path) -> None:
    events = [(f"user{n}", f"i{k}", T0 + k) for n in range(2000) for k in range(2)]
    reviews, _ = write_amazon(tmp_path, events)
    half = read("amazon2023", reviews, fraction=0.5)
    assert 900 < half["user"].n_unique() < 1100
    assert half.height == 2 * half["user"].n_unique()
    assert rows(read("amazon2023", reviews, fraction=0.5)) == rows(half)
    other = set(read("amazon2023", reviews, fraction=0.5, seed=1)["user"])
    assert 400 < len(other & set(half["user"])) < 600
    # A larger sample holds the smaller one: curves over data sizes are nested.
    assert set(read("amazon2023", reviews, fraction=0.2)["user"]) < set(half["user"])
    with pytest.raises(DatasetError, match="--user-fraction 1e-12: raise --user-fraction"):
        prepare(options(reviews, missing_title="official", user_fraction=1e-12))


@pytest.mark.parametrize("fraction", [0.0, -1.0, 1.5, np.nan])
def test_user_fraction_is_a_share(tmp_path: Path, fraction: float) -> None:
    reviews, meta = write_amazon(tmp_path, [("a", "x", T0)])
    with pytest.raises(DatasetError, match="above 0 and at most 1"):
        prepare(options(reviews, meta, user_fraction=fraction))
