"""Synthetic reviews in the layouts that the readers support, and a plain reader of built datasets."""

import gzip
import io
import json
import random
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
import pyarrow as pa

from shards.build import BuildOptions
from shards.manifest import Manifest
from shards.readers.sources import Columns
from shards.sequences import Filters

Event = tuple[str, str, int]


class User(NamedTuple):
    """One user as stored: internal item ids, 0 = absent."""

    items: list[int]
    times: list[int]
    valid: tuple[int, int]
    test: tuple[int, int]


def world(users: int = 30, items: int = 30, events: int = 12, seed: int = 0) -> list[Event]:
    """Each user has `events` distinct random items, some with equal times."""
    chance = random.Random(seed)
    rows = []
    for user in range(users):
        for item in chance.sample(range(items), events):
            rows.append((f"user-{user}", f"item-{item}", 1_500_000_000_000 + chance.randrange(20) * 86_400_000))
    return rows


def titles_of(events: list[Event]) -> dict[str, str]:
    return {item: f"Title of {item}" for _, item, _ in events}


def write_amazon(directory: Path, events: list[Event], titles: dict[str, str] | None = None) -> tuple[Path, Path]:
    """Review and metadata files in the layout of Amazon Reviews 2023 (gzip and plain)."""
    directory.mkdir(parents=True, exist_ok=True)
    reviews, meta = directory / "Things.jsonl.gz", directory / "meta_Things.jsonl"
    lines = [
        json.dumps({"rating": 5.0, "text": "ok", "parent_asin": item, "user_id": user, "timestamp": time})
        for user, item, time in events
    ]
    with gzip.open(reviews, "wt") as file:
        file.write("".join(line + "\n" for line in lines))
    entries = titles_of(events) if titles is None else titles
    meta.write_text(
        "".join(
            json.dumps({"parent_asin": item, "title": title, "description": [f"About {item}.", "More."]}) + "\n"
            for item, title in entries.items()
        )
    )
    return reviews, meta


def write_csv(path: Path, events: Sequence[tuple[object, object, object]], header: str = "user,item,time") -> Path:
    path.write_text(header + "\n" + "".join(f"{user},{item},{time}\n" for user, item, time in events))
    return path


def options(reviews: Path | tuple[Path, ...], meta: Path | None = None, **changes: Any) -> BuildOptions:
    """Build options that suit a small world."""
    filters = Filters(
        **{name: changes.pop(name) for name in ("min_user", "min_item", "min_train", "iterate") if name in changes}
    )
    given: dict[str, Any] = {
        "source": "amazon2023",
        "reviews": reviews if isinstance(reviews, tuple) else (reviews,),
        "meta": (meta,) if meta else (),
        "name": "Things",
        "filters": filters,
        "negatives": 5,
        "title_negatives": 3,
        "columns": Columns(time_unit="ms"),
        **changes,
    }
    return BuildOptions(**given)


def table_options(path: Path, **changes: Any) -> BuildOptions:
    return options(path, source="table", missing_title="official", **changes)


def read_users(directory: Path, manifest: Manifest) -> dict[int, User]:
    """All users of all shards, read with tarfile and pyarrow alone."""
    users = {}
    for shard in manifest.shards:
        with tarfile.open(directory / shard.name) as tar:
            for member in tar:
                content = tar.extractfile(member)
                assert content is not None
                for row in pa.ipc.open_stream(io.BytesIO(content.read())).read_all().to_pylist():
                    users[row["user"]] = User(
                        row["items"],
                        row["times"],
                        (row["valid_item"], row["valid_time"]),
                        (row["test_item"], row["test_time"]),
                    )
    return users


def read_named(directory: Path, manifest: Manifest) -> dict[str, dict[str, list[str]]]:
    """Raw item ids of each raw user id, by split."""
    item = {
        0: "",
        **dict(pl.read_parquet(directory / "catalog.parquet").select("item", "raw_id").iter_rows()),
    }
    name = dict(pl.read_parquet(directory / "users.parquet").select("user", "raw_id").iter_rows())
    return {
        name[user]: {
            "train": [item[number] for number in stored.items],
            "valid": [item[stored.valid[0]]] if stored.valid[0] else [],
            "test": [item[stored.test[0]]] if stored.test[0] else [],
        }
        for user, stored in read_users(directory, manifest).items()
    }


def all_bytes(directory: Path) -> dict[str, bytes]:
    """Contents of every file below a folder, by relative path."""
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()
    }
