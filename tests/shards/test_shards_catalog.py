import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from shards_helpers import options, titles_of, world, write_amazon, write_csv

from shards.build import build, prepare
from shards.manifest import DatasetError
from shards.readers.sources import Columns
from shards.readers.titles import movie_title, read_titles


def titles(source: str, path: Path, *wanted: str, **columns: Any) -> list[tuple[str, str | None, str | None]]:
    frame = read_titles(source, (path,), (path,), Columns(**columns), pl.Series(wanted))
    return frame.select("raw_id", "title", "description").rows()


def attributes(source: str, path: Path, *wanted: str, **columns: Any) -> list[tuple[str, str | None, str | None]]:
    frame = read_titles(source, (path,), (path,), Columns(**columns), pl.Series(wanted))
    return frame.select("raw_id", "brand", "category").rows()


def test_items_are_numbered_by_sorted_id(tmp_path: Path) -> None:
    reviews, meta = write_amazon(tmp_path, world())
    build(tmp_path / "out", options(reviews, meta))
    catalog = pl.read_parquet(tmp_path / "out/catalog.parquet")
    assert catalog.schema == {
        "item": pl.Int32,
        "raw_id": pl.String,
        "title": pl.String,
        "description": pl.String,
        "brand": pl.String,
        "category": pl.String,
    }
    assert catalog["item"].to_list() == list(range(1, catalog.height + 1))
    assert catalog["raw_id"].is_sorted()
    assert catalog["raw_id"].n_unique() == catalog.height
    for _, raw_id, title, *others in catalog.iter_rows():
        assert (title, *others) == (f"Title of {raw_id}", f"About {raw_id}.", "", "")


def test_amazon_meta_odd_values(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    lines = [
        {"parent_asin": "a", "title": "  Two\nlines\t here ", "description": []},
        {"parent_asin": "b", "title": None, "description": "plain"},
        {"parent_asin": "c", "title": "  "},
        {"parent_asin": "d", "title": "Z"},
        {"parent_asin": "d", "title": "Y"},
        {"parent_asin": "unwanted", "title": "T"},
    ]
    expected = [
        ("a", "Two lines here", None),
        ("b", None, "plain"),
        ("c", None, None),
        ("d", "Y", None),
    ]
    for order in (lines, lines[::-1]):
        path.write_text("\n".join(map(json.dumps, order)))
        assert titles("amazon2023", path, "a", "b", "c", "d", "e") == expected


def test_amazon_meta_parquet(tmp_path: Path) -> None:
    frame = pl.DataFrame({"parent_asin": ["a", "b"], "title": ["A", "B"], "description": [["x", "y"], []]})
    frame.write_parquet(tmp_path / "m.parquet")
    assert titles("amazon5core", tmp_path / "m.parquet", "a", "b") == [("a", "A", "x"), ("b", "B", None)]


def test_brand_and_category_where_the_source_has_them(tmp_path: Path) -> None:
    meta = tmp_path / "m.jsonl"
    lines = [
        {"parent_asin": "a", "title": "A", "store": " Acme\n Inc ", "categories": ["Audio", "Cables"]},
        {"parent_asin": "b", "title": "B", "store": None, "categories": []},
        {"parent_asin": "c", "title": "C"},
    ]
    meta.write_text("\n".join(map(json.dumps, lines)))
    expected = [("a", "Acme Inc", "Audio, Cables"), ("b", None, None), ("c", None, None)]
    assert attributes("amazon2023", meta, "a", "b", "c") == expected
    pl.DataFrame(lines, schema_overrides={"categories": pl.List(pl.String)}).write_parquet(tmp_path / "m.parquet")
    assert attributes("amazon5core", tmp_path / "m.parquet", "a", "b", "c") == expected
    atomic = tmp_path / "x.item"
    atomic.write_text("item_id:token\tmovie_title:token_seq\tclass:token_seq\n1\tA\tCrime Drama\n2\tB\t\n")
    assert attributes("recbole", atomic, "1", "2") == [("1", None, "Crime Drama"), ("2", None, None)]
    table = tmp_path / "items.csv"
    table.write_text("item,name,brand,genres\na,A,Acme,Crime\n")
    assert attributes("table", table, "a", item="item", title="name") == [("a", "Acme", "Crime")]


def test_an_attribute_that_is_not_text_is_left_out(tmp_path: Path) -> None:
    frame = pl.DataFrame({"item": ["a"], "title": ["A"], "brand": [{"name": "Acme"}], "category": [[7, 8]]})
    frame.write_parquet(tmp_path / "items.parquet")
    assert attributes("table", tmp_path / "items.parquet", "a") == [("a", None, "7, 8")]


def test_recbole_titles(tmp_path: Path) -> None:
    path = tmp_path / "x.item"
    path.write_text(
        "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
        "1\tUsual Suspects, The\t1995\tCrime\n"
        '2\tSay "Cheese"\t1999\tx\n'
        "3\tLand (1995)\tV\tx\n"
        "4\tNikita (La Femme Nikita)\t1990\tx\n"
        "5\tHorseman on the Roof, The (Hussard sur le toit, Le)\t1995\tx\n"
        "6\t\t1995\tx\n"
    )
    assert [title for _, title, _ in titles("recbole", path, "1", "2", "3", "4", "5", "6")] == [
        "The Usual Suspects (1995)",
        'Say "Cheese" (1999)',
        "Land (1995)",
        "Nikita (La Femme Nikita) (1990)",
        "The Horseman on the Roof (Hussard sur le toit, Le) (1995)",
        None,
    ]
    path.write_text("item_id:token\ttitle:token_seq\n1\tPlain, The\n")
    assert titles("recbole", path, "1") == [("1", "Plain, The", None)]
    path.write_text("item_id:token\tbrand:token\n1\tx\n")
    with pytest.raises(DatasetError, match=r"no title column \(it has item_id, brand\)"):
        titles("recbole", path, "1")


def test_movie_title_keeps_an_existing_year() -> None:
    frame = pl.DataFrame({"t": ["2001: A Space Odyssey (1968)"], "y": ["1968"]})
    assert frame.select(movie_title(pl.col("t"), pl.col("y"))).item() == "2001: A Space Odyssey (1968)"


def test_table_titles_from_meta_or_from_the_reviews(tmp_path: Path) -> None:
    events = world()
    meta = tmp_path / "m.csv"
    meta.write_text("item,name,description\n" + "".join(f'{i},"T, {i}",D\n' for i in titles_of(events)))
    table = write_csv(tmp_path / "r.csv", events)
    inside = tmp_path / "inside.csv"
    lines = "".join(f'{user},{item},{time},"T, {item}"\n' for user, item, time in events)
    inside.write_text("user,item,time,name\n" + lines)
    columns = Columns(title="name", time_unit="ms")
    one = prepare(options(table, meta, source="table", columns=columns)).catalog.frame
    two = prepare(options(inside, source="table", columns=columns)).catalog.frame
    assert one["title"].to_list() == two["title"].to_list() == [f"T, {item}" for item in one["raw_id"]]
    assert one["description"].unique().to_list() == ["D"]
    assert two["description"].unique().to_list() == [""]


def test_missing_titles(tmp_path: Path) -> None:
    events = world()
    known = titles_of(events)
    absent, empty = sorted(known)[3], sorted(known)[5]
    reviews, meta = write_amazon(tmp_path, events, {**known, empty: ""} | {})
    text = "".join(line for line in meta.open() if f'"{absent}"' not in line)
    meta.write_text(text)
    message = rf"2 of \d+ items have no title, such as '{absent}' which is not in the metadata.*official.*drop"
    with pytest.raises(DatasetError, match=message):
        prepare(options(reviews, meta))

    official = prepare(options(reviews, meta, missing_title="official"))
    found = dict(official.catalog.frame.select("raw_id", "title").iter_rows())
    assert (found[absent], found[empty]) == ("No Title", "Empty title")
    assert official.statistics.missing_titles == 2

    dropped = prepare(options(reviews, meta, missing_title="drop"))
    assert not {absent, empty} & set(dropped.catalog.frame["raw_id"])
    assert dropped.statistics.missing_titles == 0
    # As if the reviews of these items had never existed.
    rest, meta_rest = write_amazon(tmp_path / "rest", [e for e in events if e[1] not in (absent, empty)])
    assert prepare(options(rest, meta_rest)).sequences.items.tolist() == dropped.sequences.items.tolist()


def test_no_metadata_at_all(tmp_path: Path) -> None:
    reviews, _ = write_amazon(tmp_path, world())
    with pytest.raises(DatasetError, match="give the file with the titles by --meta"):
        prepare(options(reviews))
    with pytest.raises(DatasetError, match="no item has a title: give the file with the titles by --meta"):
        prepare(options(reviews, missing_title="drop"))
    assert set(prepare(options(reviews, missing_title="official")).catalog.frame["title"]) == {"No Title"}


def test_bad_metadata_files(tmp_path: Path) -> None:
    reviews, meta = write_amazon(tmp_path, world())
    with pytest.raises(DatasetError, match=r"none\.jsonl does not exist"):
        prepare(options(reviews, tmp_path / "none.jsonl"))
    # The review file given twice: a likely mistake.
    with pytest.raises(DatasetError, match=r"no field 'title' \(it has rating, text"):
        prepare(options(reviews, reviews))
    meta.write_text('{"parent_asin": "a", "title": "x"}\nnonsense\n')
    with pytest.raises(DatasetError, match=r"meta_Things\.jsonl:2 is not JSON"):
        prepare(options(reviews, meta))
