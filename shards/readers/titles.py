"""Reads titles and other texts of items from metadata files of all sources, cleaned."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import polars as pl

from shards.formats.tables import file_format, table_columns, table_frames
from shards.formats.textfiles import check_readable, json_frames
from shards.manifest import DatasetError, parse_json
from shards.readers.cleaning import clean_titles
from shards.readers.files import meta_layout
from shards.readers.ids import as_ids
from shards.readers.sources import Columns, Source, picked, source_named

# Text columns of the catalog; "" where the source has none. RECFORMER reads brand and category.
TEXTS = ("title", "description", "brand", "category")

# Names of these columns in the sources, in order of preference.
_ALIASES = {
    "description": ("description",),
    "brand": ("brand", "store"),
    "category": ("category", "categories", "genres", "genre", "class"),
}

_BLANK = " \u200b\u200c\u200d\u2060\ufeff"
"""The space, and characters of no width: a title of these alone is none."""

_MAX_TEXT_BYTES = 1 << 20

# MovieLens moves a leading article behind the title, for sorting: "Usual Suspects, The".
_ARTICLE = r"^(.*), (The|A|An|Il|La|Le|Les|El|Das|Der|Die|Det)( \(.*\))?$"


def read_titles(
    source: str,
    reviews: tuple[Path, ...],
    meta: tuple[Path, ...],
    columns: Columns,
    wanted: pl.Series,
    *,
    clean: bool = True,
    counts: Counter[str] | None = None,
) -> pl.DataFrame:
    """Read raw_id and `TEXTS` of the `wanted` raw ids; missing and blank fields are null.

    Without `meta`, the titles of a `table` may be in the review files. An id that occurs more than once keeps its
    alphabetically first title, so that the order of lines does not matter.

    Args:
        clean: remove HTML and what is no title (`cleaning.py`), counted in `counts`.

    Raises:
        DatasetError: unreadable files, missing columns, or metadata that has none of the wanted ids.
    """
    known = source_named(source)
    ids = pl.DataFrame({"raw_id": wanted})
    frames = [pl.DataFrame(schema=dict.fromkeys(("raw_id", *TEXTS), pl.String))]
    paths = meta
    if source == "table" and not meta:
        title = columns.title or known.title[0]
        paths = tuple(path for path in reviews if title in table_columns(path, [title], columns.layout))
        columns = replace(columns, meta_item=columns.item, meta_layout=columns.layout)
    stranger: str | None = None
    for path in paths:
        check_readable(path)
        for frame in _title_frames(source, known, path, columns):
            if stranger is None and frame.height:
                stranger = next(iter(frame["raw_id"].drop_nulls().head(1)), None)
            frames.append(_checked(path, frame.cast(pl.String).join(ids, on="raw_id", how="semi").unique()))
    titles = _tidy(pl.concat(frames)).unique()
    if stranger is not None and not titles.height and len(wanted):
        raise DatasetError(
            f"none of the {len(wanted):,} items is in the metadata: the reviews have ids such as {wanted[0]!r}, the "
            f"metadata such as {stranger!r}: give the file that belongs to the reviews, or name the columns with "
            "the ids by --item-column and --meta-id-column"
        )
    if clean:
        titles = _tidy(clean_titles(titles, Counter() if counts is None else counts))
    return titles.sort("raw_id", *TEXTS, nulls_last=True).unique("raw_id", keep="first").sort("raw_id")


def movie_title(title: pl.Expr, year: pl.Expr) -> pl.Expr:
    """Move the article to the front and append the year: `Usual Suspects, The`, 1995 -> `The Usual Suspects (1995)`."""
    natural = natural_title(title)
    add_year = year.str.contains(r"^\d{4}$") & ~title.str.contains(r"\(\d{4}\)$")
    return pl.when(add_year).then(natural + " (" + year + ")").otherwise(natural)


def natural_title(title: pl.Expr) -> pl.Expr:
    """Move the article to the front: `Usual Suspects, The (1995)` -> `The Usual Suspects (1995)`."""
    return title.str.replace(_ARTICLE, "$2 $1$3")


def _tidy(titles: pl.DataFrame) -> pl.DataFrame:
    """Single spaces, none at the ends; blank texts are null."""
    tidy = pl.col(*TEXTS).str.replace_all(r"\s+", " ").str.strip_chars(_BLANK)
    return titles.with_columns(tidy).with_columns(pl.col(*TEXTS).replace("", None))


def _checked(path: Path, frame: pl.DataFrame) -> pl.DataFrame:
    """The frame; raises DatasetError for a text that is too long to be one."""
    for name in TEXTS:
        if (long := frame.filter(pl.col(name).str.len_bytes() > _MAX_TEXT_BYTES)).height:
            raise DatasetError(
                f"{path}: the {name} of item {long['raw_id'][0]!r} has more than {_MAX_TEXT_BYTES:,} bytes: correct it"
            )
    return frame


def _title_frames(name: str, source: Source, path: Path, columns: Columns) -> Iterator[pl.DataFrame]:
    """Frames of raw_id and `TEXTS` of one file."""
    layout = meta_layout(path, source, columns)
    id_guess = [columns.meta_item or source.meta_item[0]]
    there = table_columns(path, id_guess, layout)
    # The reviews' name of the item column is tried first: who names it there usually means both files.
    usual = ((columns.item,) if columns.item else ()) + source.meta_item
    item = picked(columns.meta_item, usual, there)
    title = _title_column(path, source, columns.title, there)
    amazon = name in ("amazon2023", "amazon5core") and file_format(path, layout) == "json"
    # A text that the first items of a catalog lack may come later; these files may have all.
    texts = ["description", "store", "categories"] if amazon else there
    names = {item: "raw_id", title: "title"} | _optional_texts(texts, {item, title})
    if name == "recbole" and "release_year" in there and title == "movie_title":
        names["release_year"] = "year"
    for frame in _amazon_frames(path, names) if amazon else table_frames(path, names, layout):
        frame = frame.with_columns(as_ids(frame["raw_id"], path, Counter()))
        if "year" in frame.columns:
            frame = frame.with_columns(movie_title(pl.col("title"), pl.col("year")).alias("title"))
        elif source.article_last:
            frame = frame.with_columns(natural_title(pl.col("title")))
        if source.article_last and "category" in frame.columns:
            frame = frame.with_columns(pl.col("category").str.replace_all("|", ", ", literal=True))
        yield _texts(frame)


def _amazon_frames(path: Path, names: dict[str, str]) -> Iterator[pl.DataFrame]:
    """Amazon's metadata of 2023, whose descriptions and categories are lists."""
    lists = pl.List(pl.String())
    schema = {name: lists if alias in ("description", "category") else pl.String() for name, alias in names.items()}
    required = [name for name, alias in names.items() if alias in ("raw_id", "title")]
    for frame in json_frames(path, schema, required=required):
        yield frame.rename(names)


def _title_column(path: Path, source: Source, given: str | None, there: list[str]) -> str:
    """The column with the titles; raises DatasetError for a RecBole file that has none."""
    if source.title:
        return picked(given, source.title, there)
    title = given or next((name for name in there if "title" in name.lower()), "name")
    if title not in there:
        raise DatasetError(
            f"{path} has no title column (it has {', '.join(there)}): "
            "name it with --title-column, or rename one to `title`"
        )
    return title


def _optional_texts(there: Iterable[str], taken: set[str]) -> dict[str, str]:
    """Map the columns with optional texts, except the `taken` ones: name in the file -> name in the catalog."""
    left = set(there) - taken
    found = {text: next((name for name in names if name in left), None) for text, names in _ALIASES.items()}
    return {name: text for text, name in found.items() if name is not None}


def _texts(frame: pl.DataFrame) -> pl.DataFrame:
    """Select raw_id and `TEXTS`: null if missing, the first paragraph of a description, categories joined by commas."""
    columns: list[pl.Expr | pl.Series] = [pl.col("raw_id")]
    for name in TEXTS:
        column, kind = pl.col(name), frame.schema.get(name)
        if kind is None or (kind.is_nested() and kind != pl.List):
            column = pl.lit(None, dtype=pl.String).alias(name)
        elif kind == pl.List and name == "category":
            column = column.cast(pl.List(pl.String)).list.join(", ")
        elif kind == pl.List and name == "title":
            column = pl.when(column.is_not_null()).then(pl.lit('[""]')).alias(name)  # a list is no title
        elif kind == pl.List:
            column = column.list.get(0, null_on_oob=True)
        elif kind == pl.String and name in ("description", "category"):
            columns.append(_joined(frame[name], first=name == "description"))
            continue
        columns.append(column)
    return frame.select(columns)


def _joined(texts: pl.Series, *, first: bool) -> pl.Series:
    """Texts; of those that are lists in JSON the first entry, or all entries joined by commas."""
    if not texts.str.starts_with("[").any():
        return texts
    return pl.Series(texts.name, [_entries(text, first=first) for text in texts], dtype=pl.String)


def _entries(text: str | None, *, first: bool) -> str | None:
    if not text or text[0] != "[":
        return text
    try:
        entries = parse_json(text)
    except ValueError:
        return text
    if not isinstance(entries, list):
        return text
    # Amazon's categories of 2014 are lists of paths.
    flat = [str(entry) for path in entries for entry in (path if isinstance(path, list) else [path])]
    return (flat[0] if flat else None) if first else ", ".join(flat)
