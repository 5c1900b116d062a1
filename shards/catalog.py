"""The catalog: items 1..N in the order of their raw ids, with title, description (first paragraph), brand, category."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from shards.manifest import DatasetError
from shards.readers.reviews import Columns, Events
from shards.readers.tables import table_columns, table_frames
from shards.readers.textfiles import check_readable, delimited_frames, header_columns, json_frames

# Text columns of the catalog; "" where the source has none. RECFORMER reads brand and category.
TEXTS = ("title", "description", "brand", "category")

# Names of these columns in the sources, in order of preference.
_ALIASES = {
    "brand": ("brand", "store"),
    "category": ("category", "categories", "genres", "genre", "class"),
}

# Titles that the paper's code gives to items with an empty title, and to items without metadata.
EMPTY_TITLE = "Empty title"
NO_TITLE = "No Title"

_BLANK = " \u200b\u200c\u200d\u2060\ufeff"
"""The space, and characters of no width: a title of these alone is none."""

_MAX_TEXT_BYTES = 1 << 20

# MovieLens moves a leading article behind the title, for sorting: "Usual Suspects, The".
_ARTICLE = r"^(.*), (The|A|An|Il|La|Le|Les|El|Das|Der|Die|Det)( \(.*\))?$"


@dataclass(frozen=True)
class Catalog:
    """`frame` has item:i32 (1..N), raw_id and `TEXTS`; `missing_titles` items have a placeholder title."""

    frame: pl.DataFrame
    missing_titles: int


def read_titles(
    source: str, reviews: tuple[Path, ...], meta: tuple[Path, ...], columns: Columns, wanted: pl.Series
) -> pl.DataFrame:
    """Read raw_id and `TEXTS` of the `wanted` raw ids; missing and blank fields are null.

    Without `meta`, the titles of a `table` may be in the review files. An id that occurs more than once keeps its
    alphabetically first title, so that the order of lines does not matter.
    """
    ids = pl.DataFrame({"raw_id": wanted})
    empty = pl.DataFrame(schema=dict.fromkeys(("raw_id", *TEXTS), pl.String))
    frames = [empty]
    paths = meta
    if source == "table" and not meta:
        paths = tuple(path for path in reviews if columns.title in table_columns(path))
    for path in paths:
        check_readable(path)
        for frame in _title_frames(source, path, columns):
            frames.append(_checked(path, frame.cast(pl.String).join(ids, on="raw_id", how="semi").unique()))
    blank = pl.col(*TEXTS).replace("", None)
    tidy = pl.col(*TEXTS).str.replace_all(r"\s+", " ").str.strip_chars(_BLANK)
    titles = pl.concat(frames).with_columns(tidy).with_columns(blank)
    return titles.sort("raw_id", *TEXTS, nulls_last=True).unique("raw_id", keep="first").sort("raw_id")


def keep_titled(events: Events, titles: pl.DataFrame) -> Events:
    """Drop the events of items without a title (policy `drop`); called before any filter counts events.

    Raises:
        DatasetError: no item has a title.
    """
    titled = events.items.is_in(titles.filter(pl.col("title").is_not_null())["raw_id"].implode())
    if not titled.any():
        raise DatasetError(
            "no item has a title: give the file with the titles by --meta, or use --missing-title official"
        )
    codes = pl.DataFrame({"item": titled.arg_true().cast(pl.UInt32)})
    return Events(events.frame.join(codes, on="item", how="semi"), events.users, events.items)


def make_catalog(raw_ids: pl.Series, titles: pl.DataFrame, policy: str, *, has_meta: bool) -> Catalog:
    """Build the catalog of the sorted `raw_ids`.

    Args:
        policy: `official` gives items without a title the placeholders of the paper's code; else they raise.
        has_meta: whether `--meta` was given, for the message.

    Raises:
        DatasetError: items without a title, unless `policy` is `official`.
    """
    frame = pl.DataFrame({"raw_id": raw_ids}).join(
        titles.with_columns(known=pl.lit(True)), on="raw_id", how="left", maintain_order="left"
    )
    missing = frame.filter(pl.col("title").is_null())
    if missing.height and policy != "official":
        kind = "has an empty title" if missing["known"][0] else "is not in the metadata"
        meta_hint = "" if has_meta else "give the file with the titles by --meta, or "
        raise DatasetError(
            f"{missing.height:,} of {frame.height:,} items have no title, such as {missing['raw_id'][0]!r} "
            f"which {kind}: {meta_hint}use --missing-title official (literal titles) or --missing-title drop"
        )
    literal = pl.when(pl.col("known").is_null()).then(pl.lit(NO_TITLE)).otherwise(pl.lit(EMPTY_TITLE))
    frame = frame.select(
        pl.arange(1, frame.height + 1, dtype=pl.Int32).alias("item"),
        "raw_id",
        pl.col("title").fill_null(literal),
        pl.col(*TEXTS[1:]).fill_null(""),
    )
    return Catalog(frame, missing.height)


def movie_title(title: pl.Expr, year: pl.Expr) -> pl.Expr:
    """Move the article to the front and append the year: `Usual Suspects, The`, 1995 -> `The Usual Suspects (1995)`."""
    natural = title.str.replace(_ARTICLE, "$2 $1$3")
    add_year = year.str.contains(r"^\d{4}$") & ~title.str.contains(r"\(\d{4}\)$")
    return pl.when(add_year).then(natural + " (" + year + ")").otherwise(natural)


def _checked(path: Path, frame: pl.DataFrame) -> pl.DataFrame:
    """The frame; raises DatasetError for a text that is too long to be one."""
    for name in TEXTS:
        if (long := frame.filter(pl.col(name).str.len_bytes() > _MAX_TEXT_BYTES)).height:
            raise DatasetError(
                f"{path}: the {name} of item {long['raw_id'][0]!r} has more than {_MAX_TEXT_BYTES:,} bytes: correct it"
            )
    return frame


def _title_frames(source: str, path: Path, columns: Columns) -> Iterator[pl.DataFrame]:
    if source == "recbole":
        return _recbole_titles(path)
    if source == "table":
        return _table_titles(path, columns.item, columns.title)
    if path.name.lower().endswith((".parquet", ".csv", ".csv.gz")):
        return _table_titles(path, "parent_asin", "title")
    return _json_titles(path)


def _json_titles(path: Path) -> Iterator[pl.DataFrame]:
    lists = pl.List(pl.String())
    schema = {"parent_asin": pl.String(), "title": pl.String(), "description": lists}
    schema |= {"store": pl.String(), "categories": lists}
    names = {"parent_asin": "raw_id", "title": "title", "description": "description"}
    names |= {"store": "brand", "categories": "category"}
    for frame in json_frames(path, schema, required=["parent_asin", "title"]):
        yield _texts(frame.rename(names))


def _table_titles(path: Path, item: str, title: str) -> Iterator[pl.DataFrame]:
    names = {item: "raw_id", title: "title"} | _optional_texts(table_columns(path), {item, title})
    for frame in table_frames(path, names):
        yield _texts(frame)


def _recbole_titles(path: Path) -> Iterator[pl.DataFrame]:
    there = header_columns(path, separator="\t", typed_header=True)
    title = next((name for name in there if "title" in name.lower()), "name")
    if title not in there:
        raise DatasetError(
            f"{path} has no title column (it has {', '.join(there)}): "
            "rename one to `title`, or convert it to csv and use --source table"
        )
    names = {"item_id": "raw_id", title: "title"} | _optional_texts(there, {"item_id", title})
    if "release_year" in there and title == "movie_title":
        names["release_year"] = "year"
    for frame in delimited_frames(path, names, separator="\t", typed_header=True):
        if "year" in frame.columns:
            frame = frame.with_columns(movie_title(pl.col("title"), pl.col("year")).alias("title"))
        yield _texts(frame)


def _optional_texts(there: Iterable[str], taken: set[str]) -> dict[str, str]:
    """Map the columns with optional texts, except the `taken` ones: name in the file -> name in the catalog."""
    left = set(there) - taken
    aliases = {"description": ("description",), **_ALIASES}
    found = {text: next((name for name in names if name in left), None) for text, names in aliases.items()}
    return {name: text for text, name in found.items() if name is not None}


def _texts(frame: pl.DataFrame) -> pl.DataFrame:
    """Select raw_id and `TEXTS`: null if missing, the first paragraph of a description, categories joined by commas."""
    columns = [pl.col("raw_id")]
    for name in TEXTS:
        column, kind = pl.col(name), frame.schema.get(name)
        if kind is None or (kind.is_nested() and kind != pl.List):
            column = pl.lit(None, dtype=pl.String).alias(name)
        elif kind == pl.List and name == "category":
            column = column.cast(pl.List(pl.String)).list.join(", ")
        elif kind == pl.List:
            column = column.list.get(0, null_on_oob=True)
        columns.append(column)
    return frame.select(columns)
