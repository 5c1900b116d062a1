"""The sources by name, tables as people write them, folders and globs."""

import gzip
import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from shards_helpers import Event, options, read_named, world

from shards.__main__ import SOURCE_NAMES, main
from shards.build import build, prepare
from shards.formats import textfiles
from shards.formats.delimited import Layout
from shards.manifest import DatasetError
from shards.readers.sources import SOURCES, Columns

EVENTS: list[Event] = [(user.removeprefix("user-"), item.removeprefix("item-"), time) for user, item, time in world()]
ITEMS = sorted({item for _, item, _ in EVENTS})
S = [(user, item, time // 1000) for user, item, time in EVENTS]
GENRES = "|".join("0" * 19)


def lines(path: Path, rows: list[str], encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(f"{row}\n" for row in rows).encode(encoding))
    return path


def records(path: Path, rows: list[dict[str, Any]], *, python: bool = False) -> Path:
    return lines(path, [repr(row) if python else json.dumps(row) for row in rows])


def built(source: str, reviews: Path | tuple[Path, ...], meta: Path | None = None, **changes: Any) -> dict[str, str]:
    """Titles by raw id of a build that must have all events at their times."""
    columns = changes.pop("columns", Columns())
    dataset = prepare(options(reviews, meta, source=source, columns=columns, **changes))
    assert dataset.statistics.interactions == len(EVENTS)
    found = dataset.sequences
    times = {*found.times.tolist(), *found.valid_times.tolist(), *found.test_times.tolist()}
    assert times == {time for _, _, time in EVENTS}
    return dict(dataset.catalog.frame.select("raw_id", "title").iter_rows())


TITLES = {item: f"Title {item}" for item in ITEMS}
MOVIES = {item: f"The Café {item} (1995)" for item in ITEMS}


def test_amazon_2018(tmp_path: Path) -> None:
    rows = [{"reviewerID": u, "asin": i, "unixReviewTime": t, "reviewTime": "01 2, 2017"} for u, i, t in S]
    items = [{"asin": i, "title": t, "category": ["A", "B"]} for i, t in TITLES.items()]
    meta = records(tmp_path / "meta_X.json", items)
    assert built("amazon2018", records(tmp_path / "X_5.json", rows), meta) == TITLES
    ratings = lines(tmp_path / "X.csv", [f"{item},{user},5.0,{time}" for user, item, time in S])
    assert built("amazon2018", ratings, meta) == TITLES


def test_amazon_2014_has_python_in_its_metadata(tmp_path: Path) -> None:
    rows = [{"asin": i, "title": t, "categories": [["A", "B"], ["C"]], "x": None} for i, t in TITLES.items()]
    meta = records(tmp_path / "meta_X.json", rows, python=True)
    ratings = lines(tmp_path / "ratings_X.csv", [f"{user},{item},5.0,{time}" for user, item, time in S])
    assert built("amazon2014", ratings, meta) == TITLES
    reviews = records(tmp_path / "r.json", [{"reviewerID": u, "asin": i, "unixReviewTime": t} for u, i, t in S])
    catalog = prepare(options(reviews, meta, source="amazon2014", columns=Columns())).catalog.frame
    assert set(catalog["category"]) == {"A, B, C"}
    good = meta.read_text()
    for line in ("{'asin': __import__('os')}", "{'asin': [" + "1," * (1 << 19) + "]}", "{" * 10_000, "nonsense"):
        meta.write_text(f"{good}{line}\n")
        with pytest.raises(DatasetError, match=r"meta_X\.json:31 is not a Python dictionary as the lines before"):
            built("amazon2014", ratings, meta)


def test_amazon_2023_from_the_hub(tmp_path: Path) -> None:
    """Its parquet files hold nested columns beside those that are read; a folder has both files."""
    rows = [{"user_id": u, "parent_asin": i, "timestamp": t, "images": [{"hi": "x"}]} for u, i, t in EVENTS]
    pl.DataFrame(rows).write_parquet(tmp_path / "raw_review_X.parquet")
    meta = [{"parent_asin": i, "title": t, "store": None, "categories": ["A", "B"]} for i, t in TITLES.items()]
    pl.DataFrame(meta).write_parquet(tmp_path / "raw_meta_X.parquet")
    assert built("amazon2023", tmp_path / "raw_review_X.parquet", tmp_path / "raw_meta_X.parquet") == TITLES
    assert built("amazon2023", tmp_path) == TITLES
    folders = tmp_path / "hub/raw_review_X", tmp_path / "hub/raw_meta_X"
    for folder in folders:
        folder.mkdir(parents=True)
        (tmp_path / f"{folder.name}.parquet").rename(folder / "full-00000-of-00001.parquet")
    assert built("amazon2023", *folders) == TITLES
    assert built("amazon2023", tmp_path / "hub") == TITLES


def movielens(folder: Path, release: str) -> Path:
    if release == "100k":
        lines(folder / "u.data", [f"{u}\t{i}\t3\t{t}" for u, i, t in S])
        rows = [f"{i}|Café {i}, The (1995)|01-Jan-1995||http://x|{GENRES}" for i in ITEMS]
        lines(folder / "u.item", rows, "latin-1")
    elif release in ("1m", "10m"):
        lines(folder / "ratings.dat", [f"{u}::{i}::3::{t}" for u, i, t in S])
        rows = [f"{i}::Café {i}, The (1995)::Drama|Comedy" for i in ITEMS]
        lines(folder / "movies.dat", rows, "latin-1" if release == "1m" else "utf-8")
    else:
        lines(folder / "ratings.csv", ["userId,movieId,rating,timestamp", *(f"{u},{i},3.5,{t}" for u, i, t in S)])
        rows = [f'{i},"Café {i}, The (1995)",Drama|Comedy' for i in ITEMS]
        lines(folder / "movies.csv", ["movieId,title,genres", *rows])
    lines(folder / "users.dat", ["1::F::1::10::48067"])
    return folder


@pytest.mark.parametrize("release", ["100k", "1m", "10m", "32m"])
def test_every_movielens(tmp_path: Path, release: str) -> None:
    folder = movielens(tmp_path / "ml", release)
    assert built("movielens", folder) == MOVIES
    reviews = next(path for path in folder.iterdir() if path.name.startswith(("ratings", "u.data")))
    meta = next(path for path in folder.iterdir() if path.name.startswith(("movies", "u.item")))
    assert built("movielens", reviews, meta) == MOVIES
    if release != "100k":
        catalog = prepare(options(reviews, meta, source="movielens", columns=Columns())).catalog.frame
        assert set(catalog["category"]) == {"Drama, Comedy"}


def test_steam_and_yelp(tmp_path: Path) -> None:
    rows = [{"username": u, "product_id": i, "date": f"2017-{1 + int(t) % 9:02}-03"} for u, i, t in S]
    games = [{"id": i, "app_name": f"Title {i}", "genres": ["A"]} for i in ITEMS]
    records(tmp_path / "s/steam_reviews.json", rows, python=True)
    records(tmp_path / "s/steam_games.json", games, python=True)
    dataset = prepare(options(tmp_path / "s", source="steam", columns=Columns()))
    assert dataset.statistics.interactions == len(EVENTS)
    assert dict(dataset.catalog.frame.select("raw_id", "title").iter_rows()) == TITLES
    rows = [{"user_id": u, "business_id": i, "date": "2018-07-07 22:09:11", "text": "x"} for u, i, _ in S]
    records(tmp_path / "y/yelp_academic_dataset_review.json", rows)
    places = [{"business_id": i, "name": f"Title {i}", "categories": "A, B"} for i in ITEMS]
    records(tmp_path / "y/yelp_academic_dataset_business.json", places)
    catalog = prepare(options(tmp_path / "y", source="yelp", columns=Columns())).catalog.frame
    assert dict(catalog.select("raw_id", "title").iter_rows()) == TITLES
    assert set(catalog["category"]) == {"A, B"}


def test_recbole_with_other_column_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    header = "user_id:token\tplay_hours:float\tproduct_id:token\ttimestamp:float"
    inter = lines(tmp_path / "steam.inter", [header, *(f"{u}\t1.5\t{i}\t{t}.0" for u, i, t in S)])
    item = lines(tmp_path / "steam.item", ["app_name:token\tid:token", *(f"{t}\t{i}" for i, t in TITLES.items())])
    columns = Columns(item="product_id", meta_item="id", title="app_name")
    assert built("recbole", inter, item, columns=columns) == TITLES
    assert built("steam", tmp_path) == TITLES
    argv = ["build", str(tmp_path / "out"), "--source", "recbole", "--reviews", str(inter), "--meta", str(item)]
    assert main(argv) == 2
    assert "has no column 'item_id' (it has user_id, play_hours, product_id, timestamp)" in capsys.readouterr().err
    argv += ["--item-column", "product_id", "--negatives", "5", "--title-negatives", "3"]
    assert main([*argv, "--title-column", "app_name"]) == 2
    assert "has no column 'product_id' (it has app_name, id): name" in capsys.readouterr().err
    assert main([*argv, "--title-column", "app_name", "--meta-id-column", "id"]) == 0


HISTORIES = {
    "u0": ["i3", "i9", "i8", "i2", "i5", "i4"],
    "u1": ["i7", "i8", "i9", "i1", "i3", "i6"],
}


def benchmark(folder: Path, *, augmented: bool) -> tuple[Path, ...]:
    """RecBole's files: a row has a history and the item that follows it, at a time."""
    header = "user_id:token\titem_id_list:token_seq\titem_id:token\ttimestamp:float"
    ends = {"train": range(1, 4) if augmented else [3], "valid": [4], "test": [5]}
    paths = []
    for split, places in ends.items():
        rows = [
            f"{user}\t{' '.join(items[:at])}\t{items[at]}\t{1_672_531_200 + 86_400 * at}.0"
            for user, items in HISTORIES.items()
            for at in places
        ]
        paths.append(lines(folder / f"shop.{split}.inter", [header, *rows]))
    return tuple(paths)


@pytest.mark.parametrize("augmented", [False, True])
def test_recbole_histories_are_kept_with_the_given_split(tmp_path: Path, augmented: bool) -> None:
    paths = benchmark(tmp_path, augmented=augmented)
    small: dict[str, Any] = {"min_item": 1, "min_user": 2, "min_train": 2, "negatives": 2, "title_negatives": 2}
    given = options(paths[::-1], source="recbole", columns=Columns(), missing_title="official", **small)
    manifest = build(tmp_path / "out", given)
    assert manifest.statistics.interactions == 12
    found = read_named(tmp_path / "out", manifest)
    assert found == {u: {"train": h[:4], "valid": h[4:5], "test": h[5:]} for u, h in HISTORIES.items()}
    assert manifest.cleaning == {"times_from_the_next_event": 2 if augmented else 6}


def test_histories_that_do_not_continue_one_another_are_refused(tmp_path: Path) -> None:
    paths = benchmark(tmp_path, augmented=False)
    text = paths[2].read_text()
    paths[2].write_text(text.replace("i7 i8", "i8 i7"))
    given = options(paths, source="recbole", columns=Columns())
    with pytest.raises(DatasetError, match=r"shop\.test\.inter: user 'u1' has rows whose histories do not continue"):
        prepare(given)
    paths[2].write_text(text)
    with pytest.raises(DatasetError, match="give one to three files whose names contain train, valid and test"):
        prepare(options((paths[0].rename(tmp_path / "a.inter"),), source="recbole", columns=Columns()))


@pytest.mark.parametrize("separator", [",", ";", "\t", "|", "::", " "])
@pytest.mark.parametrize("header", [True, False])
def test_tables_with_any_separator(tmp_path: Path, separator: str, header: bool) -> None:
    rows = [separator.join((u, i, str(t))) for u, i, t in S]
    path = lines(tmp_path / "log.txt", [separator.join(("user", "item", "time")), *rows] if header else rows)
    names = None if header else ("user", "item", "time")
    for layout in (Layout(names=names), Layout(separator, names)):
        assert set(built("table", path, columns=Columns(layout=layout), missing_title="official")) == set(ITEMS)
    if not header:
        with pytest.raises(DatasetError, match=r"seems to have no header .*--no-header --columns NAME,NAME"):
            built("table", path, columns=Columns())
        with pytest.raises(DatasetError, match=r"has 3 columns separated by .*, not 2 \(user, item\): its"):
            built("table", path, columns=Columns(layout=Layout(separator, ("user", "item"))))


def test_habits_of_csv(tmp_path: Path) -> None:
    """A byte order mark, CRLF, an index column without a name, quoted names, line ends in titles, another encoding."""
    rows = [f'{n},{u},"{i}",{t}\r' for n, (u, i, t) in enumerate(S)]
    path = lines(tmp_path / "r.csv", ['\ufeff,"user","item",time\r', *rows])
    titles = [f'{i},"Two\nlines; ""{i}"" é"' for i in ITEMS]
    meta = lines(tmp_path / "m.csv", ["item,title", *titles], "cp1252")
    columns = Columns(meta_layout=Layout(encoding="cp1252"))
    assert built("table", path, meta, columns=columns) == {item: f'Two lines; "{item}" é' for item in ITEMS}
    with pytest.raises(DatasetError, match=r"m\.csv:3 is not UTF-8 text .* such as --encoding latin-1"):
        built("table", path, meta)
    with pytest.raises(DatasetError, match="--encoding klingon: Python knows no such encoding"):
        built("table", path, meta, columns=Columns(meta_layout=Layout(encoding="klingon")))


def test_quoted_line_ends_at_the_end_of_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = lines(tmp_path / "r.csv", ["user,item,time", *(f"{u},{i},{t}" for u, i, t in S)])
    meta = lines(tmp_path / "m.csv", ["item,title", *(f'{i},"Title\n{i}"' for i in ITEMS)])
    monkeypatch.setattr(textfiles.line_blocks, "__defaults__", (100,))
    assert built("table", path, meta) == TITLES


def test_tables_in_json(tmp_path: Path) -> None:
    path = records(tmp_path / "r.jsonl", [{"user": u, "item": int(i), "time": t} for u, i, t in S])
    meta = records(tmp_path / "m.jsonl", [{"item": int(i), "title": t} for i, t in TITLES.items()])
    assert built("table", path, meta) == TITLES
    packed = tmp_path / "r.json.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert built("table", packed, meta) == TITLES


def test_folders_and_globs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frame = pl.DataFrame(S, schema=["user", "item", "time"], orient="row")
    folder = tmp_path / "events"
    for part in range(3):
        (folder / f"day={part}").mkdir(parents=True)
        frame.gather_every(3, part).write_parquet(folder / f"day={part}/part-0.parquet")
    (folder / "_SUCCESS").touch()
    (folder / ".part-0.parquet.crc").touch()
    meta = lines(tmp_path / "m.csv", ["item,title", *(f"{i},{t}" for i, t in TITLES.items())])
    assert built("table", folder, meta) == TITLES
    assert built("table", folder / "day=*" / "*.parquet", meta) == TITLES
    with pytest.raises(DatasetError, match=r"none-\*\.csv matches no files: check the pattern"):
        built("table", tmp_path / "none-*.csv", meta)
    with pytest.raises(DatasetError, match=r"events has no files named ratings\.dat, ratings\.csv, u\.data"):
        built("movielens", folder)


def test_the_command_for_a_log_without_header(tmp_path: Path) -> None:
    path = lines(tmp_path / "UserBehavior.csv", [f"{u},{i},30,pv,{t}" for u, i, t in S])
    meta = lines(tmp_path / "items.csv", [f"{i}#{t}" for i, t in TITLES.items()])
    argv = f"build {tmp_path / 'out'} --source table --reviews {path} --meta {meta} --negatives 5 --title-negatives 3"
    more = "--no-header --columns user,item,category,behavior,time --separator , --meta-columns item,title"
    assert main([*argv.split(), *more.split()]) == 2  # the separator is that of both files
    lines(meta, [f"{i},{t}" for i, t in TITLES.items()])
    assert main([*argv.split(), *more.split()]) == 0


def test_sources_that_help_lists_are_those_that_are_read() -> None:
    assert list(SOURCES) == SOURCE_NAMES
