"""Titles and ids as people bring them: HTML, scripts, NaN, lists, floats; each change is counted."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from shards_helpers import options, table_options, titles_of, world, write_amazon, write_csv

from shards.__main__ import main
from shards.build import build, prepare
from shards.manifest import DatasetError, read_manifest
from shards.readers.cleaning import clean_titles
from shards.readers.ids import as_ids


def cleaned(*titles: str | None) -> tuple[list[str | None], dict[str, int]]:
    counts: Counter[str] = Counter()
    frame = pl.DataFrame({"raw_id": [str(n) for n in range(len(titles))], "title": titles}, schema_overrides=TEXT)
    return clean_titles(frame, counts)["title"].to_list(), dict(counts)


TEXT = {"title": pl.String()}


@pytest.mark.parametrize(
    ("title", "clean", "reasons"),
    [
        ("Amber &amp; Co. 12&quot; Lamp", 'Amber & Co. 12" Lamp', {"titles_unescaped": 1}),
        ("Twice &amp;quot;escaped&amp;quot;", 'Twice "escaped"', {"titles_unescaped": 1}),
        ("Denim&#39;s &#x41;pron", "Denim's Apron", {"titles_unescaped": 1}),
        ('<span id="t" class="a b">Brass Kettle</span>', "Brass Kettle", {"titles_without_tags": 1}),
        ("Apron<br />Blue", "Apron Blue", {"titles_without_tags": 1}),
        ("<b>Bo</b>ld", "Bold", {"titles_without_tags": 1}),
        ("&lt;i&gt;Both&lt;/i&gt;", "Both", {"titles_unescaped": 1, "titles_without_tags": 1}),
        ("Lamp<script>var a = 1;</script><!-- x -->", "Lamp  ", {"titles_without_tags": 1}),
        ("var aPageStart = (new Date()).getTime(); var ue_t0 = 1;", None, {"titles_scripts": 1}),
        ("$(function () { alert(1) })", None, {"titles_scripts": 1}),
        ("nan", None, {"titles_nan_or_none": 1}),
        ("None", None, {"titles_nan_or_none": 1}),
        ('["Grove Chair", "Oak"]', None, {"titles_not_text": 1}),
        # What looks alike and is a title.
        ("I <3 You, R&B, AT&T & Salt&copper", "I <3 You, R&B, AT&T & Salt&copper", {}),
        ("List<String> for <T>", "List<String> for <T>", {}),
        ("Nan", "Nan", {}),
        ("[REC] 2", "[REC] 2", {}),
        ('[12" Lamp]', '[12" Lamp]', {}),
        ("The Function of Reason; let it be = 1", "The Function of Reason; let it be = 1", {}),
        (None, None, {}),
    ],
)
def test_titles(title: str | None, clean: str | None, reasons: dict[str, int]) -> None:
    assert cleaned(title) == ([clean], reasons)


@pytest.mark.parametrize("part", ["<script", "<!--", "<span ", "&amp", "var a=", "function(", "<b", "[", "document."])
def test_a_text_made_to_be_slow_is_not(part: str) -> None:
    """A quadratic pattern would take minutes here, and fail by the suite's time limit."""
    cleaned(part * 100_000)


def test_counts_are_in_the_manifest_and_told_at_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    events = world()
    names = titles_of(events)
    first, second, third, fourth = sorted(names)[:4]
    names |= {first: "A &amp; B", second: "<i>C</i>", third: "var x = 1; f();"}
    reviews, meta = write_amazon(tmp_path, events, names)
    lines = [json.loads(line) for line in meta.read_text().splitlines()]
    for line in lines:
        if line["parent_asin"] == fourth:
            line["title"] = float("nan")
        line["price"] = float("nan")  # not read, and so no reason to stop
    meta.write_text("".join(json.dumps(line) + "\n" for line in lines))
    argv = ["build", str(tmp_path / "out"), "--source", "amazon2023", "--reviews", str(reviews), "--meta", str(meta)]
    small = ["--negatives", "5", "--title-negatives", "3"]
    assert main([*argv, *small]) == 2
    assert "2 of 30 items have no title" in capsys.readouterr().err
    assert main([*argv, *small, "--missing-title", "drop"]) == 0
    told = capsys.readouterr().err
    manifest = read_manifest(tmp_path / "out")
    reasons = ("titles_unescaped", "titles_without_tags", "titles_scripts", "titles_nan_or_none")
    assert manifest.cleaning == dict.fromkeys(reasons, 1)
    lost = sum(item in (third, fourth) for _, item, _ in events)
    assert f"events: 360 read, {360 - lost} kept; dropped: {lost} of items without a title" in told
    assert "titles that are scripts of a web page, now missing: 1" in told
    catalog = dict(pl.read_parquet(tmp_path / "out/catalog.parquet").select("raw_id", "title").iter_rows())
    assert (catalog[first], catalog[second]) == ("A & B", "C")
    raw = build(tmp_path / "raw", options(reviews, meta, titles="raw", missing_title="official"))
    assert (raw.build["titles"], raw.cleaning) == ("raw", {})


def test_a_manifest_without_cleaning_does_not_mention_it(tmp_path: Path) -> None:
    manifest = build(tmp_path / "out", options(*write_amazon(tmp_path, world())))
    assert manifest.cleaning == {}
    assert "cleaning" not in json.loads((tmp_path / "out/manifest.json").read_text())
    with pytest.raises(DatasetError, match=r"cleaning: 'x' is -1, which is not a number of rows"):
        read_changed(tmp_path / "out", cleaning={"x": -1})


def read_changed(directory: Path, **fields: Any) -> None:
    path = directory / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    read_manifest(directory)


@pytest.mark.parametrize(
    ("values", "ids"),
    [
        ([1.0, 2.0, None, float("nan")], ["1", "2", None, None]),
        ([1.0, 2.5], ["1", "2.5"]),
        ([2.0**53, 2.0**53 + 2, 1e18], ["9007199254740992", "9007199254740994", "1000000000000000000"]),
        ([2**53, 2**53 + 1], ["9007199254740992", "9007199254740993"]),
        (["1.0", "-3.0", "1.50", "v2.0", "B01", "1e+16", "123e45", "é.0"],
         ["1", "-3", "1.50", "v2.0", "B01", "10000000000000000", "123e45", "é.0"]),
    ],
)  # fmt: skip
def test_ids(values: list[Any], ids: list[str | None]) -> None:
    assert as_ids(pl.Series("item", values), Path("x"), Counter()).to_list() == ids


@pytest.mark.parametrize("value", [["a"], {"a": 1}])
def test_lists_and_objects_are_no_ids(tmp_path: Path, value: object) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps({"user": "u", "item": value, "time": 1_500_000_000}) + "\n")
    with pytest.raises(DatasetError, match=r"r\.jsonl: item ids such as .* are not text: give ids"):
        prepare(table_options(path))


@pytest.mark.parametrize("reviews", ["csv", "parquet"])
@pytest.mark.parametrize("meta", ["csv", "parquet", "jsonl"])
def test_float_ids_find_their_titles(tmp_path: Path, reviews: str, meta: str) -> None:
    """pandas makes floats of integers beside a missing value; the metadata has them as integers."""
    events = [(float(user[5:]), float(item[5:]), time) for user, item, time in world()]
    frame = pl.DataFrame(events, schema=["user", "item", "time"], orient="row")
    items = pl.DataFrame({"item": range(30), "title": [f"T{item}" for item in range(30)]})
    frame.write_csv(tmp_path / "r.csv")
    frame.write_parquet(tmp_path / "r.parquet")
    items.write_csv(tmp_path / "m.csv")
    items.write_parquet(tmp_path / "m.parquet")
    items.write_ndjson(tmp_path / "m.jsonl")
    given = options(tmp_path / f"r.{reviews}", tmp_path / f"m.{meta}", source="table")
    dataset = prepare(given)
    titles = dict(dataset.catalog.frame.select("raw_id", "title").iter_rows())
    assert titles == {str(item): f"T{item}" for item in range(30)}
    assert dataset.cleaning["ids_from_floats"] == 720


def test_no_match_at_all_shows_an_id_of_each_side(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "r.csv", world())
    meta = tmp_path / "m.csv"
    meta.write_text("item,title\nB0001,A\nB0002,B\n")
    for policy in ("error", "official", "drop"):
        with pytest.raises(DatasetError, match=r"none of the 30 items .* as 'item-0', the metadata such as 'B0001'"):
            prepare(options(path, meta, source="table", missing_title=policy))


def test_rows_without_an_id(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "r.csv", [*world(), ("", "item-1", 1_500_000_000_000), ("u", "", 1_500_000_000_000)])
    with pytest.raises(DatasetError, match=r"1 events have no user id: .* use --missing-ids drop"):
        prepare(table_options(path))
    manifest = build(tmp_path / "out", table_options(path, missing_ids="drop"))
    assert manifest.cleaning == {"events_without_id": 2}
    assert manifest.statistics.interactions == 360


def test_a_filter_that_loses_many_users_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rare = [(f"rare-{n}", f"item-{n % 30}", 1_500_000_000_000 + n) for n in range(20)]
    short = [(f"short-{n}", f"item-{k}", 1_500_000_000_000 + k) for n in range(20) for k in range(6)]
    path = write_csv(tmp_path / "r.csv", [*world(), *rare, *short])
    base = ["--source", "table", "--reviews", str(path), "--negatives", "5", "--title-negatives", "3"]
    assert main(["build", str(tmp_path / "out"), *base, "--missing-title", "official"]) == 0
    told = capsys.readouterr().err
    few = "of users with too few training items"
    assert f"warning: 20 of 50 users (40%) are lost with the events {few}: lower --min-train to keep them" in told
    assert "by the k-core filter: lower" not in told  # 20 of 70
    assert f"events: 500 read, 360 kept; dropped: 20 by the k-core filter, 120 {few}" in told
