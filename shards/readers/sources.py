"""The kinds of data that people bring, as rows of a table: names of files and columns, and the unit of times.

Formats (parquet, JSON lines, text tables) are found by content, so a source is nothing but names. Every name can be
replaced by an option.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from shards.formats.delimited import Layout
from shards.manifest import DatasetError

_TABLES = tuple(
    f"*.{kind}{packed}" for kind in ("csv", "tsv", "txt", "dat", "json", "jsonl", "ndjson") for packed in ("", ".gz")
) + ("*.parquet",)


@dataclass(frozen=True)
class Columns:
    """Names that the user gives; None takes the source's own. `meta_item` is the column of ids beside the titles.

    `time_unit` is one of `times.UNITS`; None takes the source's, or the one that fits the size of the numbers.
    `layout` and `meta_layout` are for text tables of reviews and of titles.
    """

    user: str | None = None
    item: str | None = None
    time: str | None = None
    title: str | None = None
    meta_item: str | None = None
    time_unit: str | None = None
    layout: Layout = field(default_factory=Layout)
    meta_layout: Layout = field(default_factory=Layout)


@dataclass(frozen=True)
class Source:
    """A kind of data. Of several column names the first that a file has is read.

    `reviews` and `meta` are patterns of names or paths in a folder; `headerless` and `meta_headerless` the columns of
    its files without a header, told apart by their number. `typed`: text tables are RecBole's. `latin1`: titles that
    are not UTF-8 are Latin-1. `article_last`: titles are sorted by `Usual Suspects, The`, and genres joined by bars.
    """

    user: tuple[str, ...]
    item: tuple[str, ...]
    time: tuple[str, ...]
    meta_item: tuple[str, ...]
    title: tuple[str, ...]
    unit: str | None
    reviews: tuple[str, ...] = _TABLES
    meta: tuple[str, ...] = ()
    headerless: tuple[tuple[str, ...], ...] = ()
    meta_headerless: tuple[tuple[str, ...], ...] = ()
    typed: bool = False
    latin1: bool = False
    article_last: bool = False


def _amazon(item: str, user: str, time: str, unit: str, ratings: tuple[str, ...] = ()) -> Source:
    return Source(
        user=(user,),
        item=(item,),
        time=(time,),
        meta_item=(item,),
        title=("title",),
        unit=unit,
        meta=("*meta_*",),  # also files in the hub's folders `raw_meta_CATEGORY`
        headerless=(ratings,) if ratings else (),
    )


_GENRES = tuple(f"genre {number}" for number in range(19))

SOURCES = {
    "amazon2023": _amazon("parent_asin", "user_id", "timestamp", "ms"),
    "amazon5core": _amazon("parent_asin", "user_id", "timestamp", "ms"),
    # The files with ratings only have the item first in 2018, the user in 2014.
    "amazon2018": _amazon(
        "asin", "reviewerID", "unixReviewTime", "s", ("asin", "reviewerID", "overall", "unixReviewTime")
    ),
    "amazon2014": _amazon(
        "asin", "reviewerID", "unixReviewTime", "s", ("reviewerID", "asin", "overall", "unixReviewTime")
    ),
    "movielens": Source(
        user=("userId",),
        item=("movieId",),
        time=("timestamp",),
        meta_item=("movieId",),
        title=("title",),
        unit="s",
        reviews=("ratings.dat", "ratings.csv", "u.data"),
        meta=("movies.dat", "movies.csv", "u.item"),
        headerless=(("userId", "movieId", "rating", "timestamp"),),
        meta_headerless=(
            ("movieId", "title", "genres"),
            ("movieId", "title", "release date", "video release date", "url", *_GENRES),
        ),
        latin1=True,
        article_last=True,
    ),
    "steam": Source(
        user=("username", "user_id"),
        item=("product_id", "item_id"),
        time=("date", "timestamp"),
        meta_item=("id", "item_id", "product_id"),
        title=("title", "app_name"),
        unit="s",
        reviews=("steam_reviews*", "steam.inter"),
        meta=("steam_games*", "steam.item"),
    ),
    "yelp": Source(
        user=("user_id",),
        item=("business_id",),
        time=("date",),
        meta_item=("business_id",),
        title=("name",),
        unit="s",
        reviews=("*review.json*",),
        meta=("*business.json*",),
    ),
    "recbole": Source(
        user=("user_id",),
        item=("item_id",),
        time=("timestamp",),
        meta_item=("item_id",),
        title=(),
        unit="s",
        typed=True,
        reviews=("*.inter",),
        meta=("*.item",),
    ),
    "table": Source(user=("user",), item=("item",), time=("time",), meta_item=("item",), title=("title",), unit=None),
}


def source_named(name: str) -> Source:
    """The source; raises DatasetError for an unknown name."""
    if name not in SOURCES:
        raise DatasetError(f"unknown source {name!r}: choose one of {', '.join(SOURCES)}")
    return SOURCES[name]


def picked(given: str | None, usual: tuple[str, ...], there: Iterable[str]) -> str:
    """The column to read: the given one, or the first usual one that is there (or the first, for the message)."""
    columns = set(there)
    return given or next((name for name in usual if name in columns), usual[0])
