"""The catalog: items 1..N in the order of their raw ids, with title, description (first paragraph), brand, category."""

from dataclasses import dataclass

import polars as pl

from shards.manifest import DatasetError
from shards.readers.titles import TEXTS

# Titles that the paper's code gives to items with an empty title, and to items without metadata.
EMPTY_TITLE = "Empty title"
NO_TITLE = "No Title"


@dataclass(frozen=True)
class Catalog:
    """`frame` has item:i32 (1..N), raw_id and `TEXTS`; `missing_titles` items have a placeholder title."""

    frame: pl.DataFrame
    missing_titles: int


def titled_items(items: pl.Series, titles: pl.DataFrame) -> pl.Series:
    """Whether each of the raw ids has a title (policy `drop`).

    Raises:
        DatasetError: no item has a title.
    """
    titled = items.is_in(titles.filter(pl.col("title").is_not_null())["raw_id"].implode())
    if not titled.any():
        raise DatasetError(
            "no item has a title: give the file with the titles by --meta, or use --missing-title official"
        )
    return titled


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
        kind = "has an empty title (or a script or NaN for one)" if missing["known"][0] else "is not in the metadata"
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
