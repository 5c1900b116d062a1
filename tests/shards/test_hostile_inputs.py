"""Reviews and titles that come from anyone: each ends in one line with file, line or column, and the cure; none fills
the memory."""

import gzip
import json
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from shards_helpers import titles_of, world, write_amazon, write_csv

from shards.__main__ import main
from shards.formats.parquet import _is_small
from shards.formats.tables import table_frames
from shards.formats.textfiles import json_frames

DEEP = "[" * 10_000 + "]" * 10_000
EVENT = {"user_id": "user-1", "parent_asin": "item-1", "timestamp": 1_500_000_000_000}
MOST = {"amazon2023": [], "table": ["--time-unit", "ms", "--missing-title", "official"], "recbole": []}


def build(tmp_path: Path, source: str, reviews: Path, meta: Path | None = None) -> list[str]:
    out, metas = str(tmp_path / "out"), ["--meta", str(meta)] if meta else []
    negatives = ["--negatives", "5", "--title-negatives", "3"]
    return ["build", out, "--source", source, "--reviews", str(reviews), *metas, *negatives, *MOST[source]]


def refused(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    """Run a command that must end in one error line, without a panic of a library; returns the line."""
    assert main(argv) == 2
    *log, last = capsys.readouterr().err.rstrip("\n").split("\n")
    assert last.startswith("error: ")
    assert not any("panicked" in line or line.startswith("error") for line in log)
    assert not Path(argv[1]).exists()
    return last


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (json.dumps(EVENT)[:-1] + f', "x": {DEEP}}}', "nested too deeply"),
        (f'{{"user_id": {DEEP}}}', "nested too deeply"),
        ('{"user_id": "u", "parent_asin": "i", "timestamp": 99999999999999999999}', "not Int64: correct or remove"),
        ('{"user_id": "u", "parent_asin": "i", "timestamp": "-99999999999999999999"}', "not Int64: correct or remove"),
        ('{"user_id": "u", "parent_asin": "i", "timestamp": 1e40}', "not Int64: correct or remove"),
        ('{"user_id": "u", "parent_asin": "i", "timestamp": ' + "9" * 5000 + "}", "is not JSON"),
        ('{"user_id": "\\ud800", "parent_asin": "i", "timestamp": 1}', r"'\ud800', not String: correct or remove"),
        ('{"user_id": "u", "parent_asin": "a\\udc00b", "timestamp": 1}', r"'a\udc00b', not String: correct or remove"),
    ],
)
def test_lines_of_reviews(tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, message: str) -> None:
    _, meta = write_amazon(tmp_path, world())
    plain = tmp_path / "plain.jsonl"
    plain.write_text("".join(json.dumps(EVENT | {"timestamp": 1 + n}) + "\n" for n in range(7)) + line + "\n")
    found = refused(capsys, build(tmp_path, "amazon2023", plain, meta))
    assert f"{plain}:8 " in found
    assert message in found


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"parent_asin": "item-1", "title": "a\\ud83d"}', "'title' = 'a\\ud83d', not String: correct or remove"),
        (b'{"parent_asin": "item-1", "title": "a", "description": ["\\ud83d"]}', "not List(String): correct or remove"),
        (b'{"parent_asin": "item-1", "title": "a\xff"}', "is not UTF-8 text"),
        (b'{"parent_asin": "item-1", "title": "a\xed\xa0\x80"}', "is not UTF-8 text"),
        (b'{"x": ' + DEEP.encode() + b"}", "nested too deeply"),
    ],
)
def test_lines_of_titles(tmp_path: Path, capsys: pytest.CaptureFixture[str], line: bytes, message: str) -> None:
    reviews, meta = write_amazon(tmp_path, world())
    number = meta.read_bytes().count(b"\n") + 1
    meta.write_bytes(meta.read_bytes() + line + b"\n")
    found = refused(capsys, build(tmp_path, "amazon2023", reviews, meta))
    assert f"{meta}:{number} " in found
    assert message in found


def test_an_escaped_character_is_no_lone_surrogate(tmp_path: Path) -> None:
    """Also one of no width, and NUL, for which polars gives the lone surrogates."""
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": "\\ud83d\\ude00"}\n{"a": "x\\u0000"}\n')
    [frame] = json_frames(path, {"a": pl.String()}, required=["a"])
    assert frame["a"].to_list() == ["\U0001f600", "x\0"]


@pytest.mark.parametrize(
    ("last", "message"),
    [
        (b"\xff\xfe,item-1,1500000000000\n", r"{path}:362 is not UTF-8 text"),
        (b'"user-1,item-1,1500000000000\n', r"{path} is not a readable csv file"),
    ],
)
def test_lines_of_csv(tmp_path: Path, capsys: pytest.CaptureFixture[str], last: bytes, message: str) -> None:
    path = write_csv(tmp_path / "x.csv", world())
    path.write_bytes(path.read_bytes() + last)
    assert message.format(path=path) in refused(capsys, build(tmp_path, "table", path))


@pytest.mark.parametrize(
    ("last", "message"),
    [
        ("u\ti\t1\tx\ty\n", "{path}:32 cannot be split into 3 columns"),
        ("u\ti\t" + "9" * 30 + "\n", "is after the year 2100"),
    ],
)
def test_lines_of_recbole_files(tmp_path: Path, capsys: pytest.CaptureFixture[str], last: str, message: str) -> None:
    path = tmp_path / "x.inter"
    path.write_text("user_id:token\titem_id:token\ttimestamp:float\n" + "u\ti\t1\n" * 30 + last)
    assert message.format(path=path) in refused(capsys, build(tmp_path, "recbole", path))


def test_a_column_that_occurs_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    csv = write_csv(tmp_path / "x.csv", world(), header="user,item,time")
    csv.write_text(csv.read_text().replace("user,item,time", "item,user,item,time").replace("\nuser", "\nx,user"))
    recbole = tmp_path / "x.inter"
    recbole.write_text("user_id:token\tuser_id:token\titem_id:token\ttimestamp:float\nu\tu\ti\t1\n")
    user, item, time = map(pa.array, zip(*world(), strict=True))
    parquet = tmp_path / "x.parquet"
    pq.write_table(pa.Table.from_arrays([user, item, time, item], ["user", "item", "time", "item"]), parquet)
    assert f"{csv} has 2 columns 'item': rename" in refused(capsys, build(tmp_path, "table", csv))
    assert f"{recbole} has 2 columns 'user_id': rename" in refused(capsys, build(tmp_path, "recbole", recbole))
    assert f"{parquet} has 2 columns 'item': rename" in refused(capsys, build(tmp_path, "table", parquet))


NO_TEXT = pa.array([b"\xff\xfe"], pa.binary())


@pytest.mark.parametrize(
    ("title", "message"),
    [
        (NO_TEXT, "column 'title' (binary) cannot be read"),
        (NO_TEXT.view(pa.string()), "column 'title' (large_string) cannot be read"),
        (
            pa.array([0], pa.timestamp("ms", tz="Nowhere/X")),
            "column 'title' (timestamp[ms, tz=Nowhere/X]) cannot be read",
        ),
        (pa.array(["x" * (1 << 20) + "y"]), "the title of item 'item-1' has more than 1,048,576 bytes"),
    ],
)
def test_columns_that_are_no_titles(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], title: pa.Array, message: str
) -> None:
    reviews, meta = write_csv(tmp_path / "x.csv", world()), tmp_path / "items.parquet"
    pq.write_table(pa.table({"item": ["item-1"], "title": title}), meta)
    assert f"{meta}: {message}" in refused(capsys, build(tmp_path, "table", reviews, meta))


def test_binary_titles_that_are_text_are_read(tmp_path: Path) -> None:
    path = tmp_path / "items.parquet"
    pq.write_table(pa.table({"item": ["i1", "i2"], "title": pa.array(["é".encode(), None], pa.binary())}), path)
    [frame] = table_frames(path, {"title": "title"})
    assert frame["title"].to_list() == ["é", None]


def test_titles_that_nobody_can_see_are_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    events = world()
    titles = titles_of(events) | {"item-3": "\u200b \ufeff\u200d"}
    reviews, meta = write_amazon(tmp_path, events, titles)
    found = refused(capsys, build(tmp_path, "amazon2023", reviews, meta))
    assert "1 of 30 items have no title, such as 'item-3'" in found


def test_an_id_of_a_megabyte(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It would be hashed for seconds, byte by byte."""
    for column in (0, 1):
        row = ["user-1", "item-1", "1500000000000"]
        row[column] = "x" * (1 << 20)
        path = write_csv(tmp_path / "x.csv", [*world(), tuple(row)])  # type: ignore[list-item]
        found = refused(capsys, build(tmp_path, "table", path))
        assert "id that begins with 'xxxxxxxx" in found
        assert "has more than 4,096 bytes" in found
        assert len(found) < 1000


@pytest.mark.parametrize("name", ["a\udc80", "a\nb", "\x1b[2J"])
def test_names_that_are_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    reviews, meta = write_amazon(tmp_path, world())
    found = refused(capsys, [*build(tmp_path, "amazon2023", reviews, meta), "--name", name])
    assert "give another by --name" in found


def test_a_header_of_a_hundred_thousand_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.csv"
    path.write_text(",".join(f"column{n}" for n in range(100_000)) + "\n1\n")
    found = refused(capsys, build(tmp_path, "table", path))
    assert "has no column 'user'" in found
    assert "--user-column" in found
    assert len(found) < 1000


def test_a_gzip_file_made_to_fill_the_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without lines, the first one ends the reading; with lines, the ratio of the sizes does."""
    zeros, lines = tmp_path / "zeros.jsonl.gz", tmp_path / "lines.csv.gz"
    zeros.write_bytes(gzip.compress(bytes(100 << 20), 1))
    lines.write_bytes(gzip.compress(b"user,item,time\n" + b"u,i,1500000000000\n" * (4 << 20), 9))
    _, meta = write_amazon(tmp_path / "other", world())
    found = refused(capsys, build(tmp_path, "amazon2023", zeros, meta))
    assert f"{zeros}:1 is longer than 16,777,216 bytes: give a file with one record a line" in found
    found = refused(capsys, build(tmp_path, "table", lines))
    assert f"{lines} decompresses to more than 200 times its size" in found


@pytest.mark.parametrize(("rows", "length"), [(2000, 2_000_000), (1 << 20, 4096)])
def test_a_parquet_file_made_to_fill_the_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: int, length: int
) -> None:
    """One long title that every row refers to: gigabytes, in the second case a multiple of 2^32."""
    path, reviews = tmp_path / "items.parquet", write_csv(tmp_path / "x.csv", world())
    indices, title = pa.array([0] * rows, pa.int32()), pa.array(["x" * length])
    pq.write_table(
        pa.table({"item": ["item-1"] * rows, "title": pa.DictionaryArray.from_arrays(indices, title)}),
        path, store_schema=False, compression="zstd",
    )  # fmt: skip
    assert path.stat().st_size < 500_000
    before = pa.default_memory_pool().max_memory()
    found = refused(capsys, build(tmp_path, "table", reviews, path))
    assert f"{path}: {rows:,} rows of column 'title' hold {rows * length:,} bytes" in found
    assert pa.default_memory_pool().max_memory() < before + (100 << 20)


def test_long_texts_in_every_row_are_not_decoded_whole(tmp_path: Path) -> None:
    path = tmp_path / "items.parquet"
    table = pa.table({"item": ["item-1"] * 8000, "title": ["x" * 50_000] * 8000})
    pq.write_table(table, path, use_dictionary=False, compression="zstd")
    assert not _is_small(pq.read_metadata(path), {"item", "title"})
    assert _is_small(pq.read_metadata(path), {"item"})


def test_column_names_are_no_patterns(tmp_path: Path) -> None:
    path = tmp_path / "a[1].parquet"
    pq.write_table(pa.table({"^i.*$": ["u1", "u2"], "item": ["i1", "i2"]}), path)
    [frame] = table_frames(path, {"^i.*$": "user", "item": "item"})
    assert frame.to_dict(as_series=False) == {"user": ["u1", "u2"], "item": ["i1", "i2"]}
