"""Seeded synthetic reviews with a planted order, for tests and loader benchmarks: no downloads, any size.

Each item has one successor. With probability `order`, a user's next item is the successor of the last one, otherwise a
random item. A model that uses order can predict the next item; one that ignores it does no better than chance.
"""

from pathlib import Path

import numpy as np
import polars as pl

_DAY_MS = 86_400_000
_START_MS = 1_420_070_400_000  # 2015-01-01 UTC
_WORDS = ("Amber", "Brass", "Cedar", "Denim", "Ember", "Flint", "Grove", "Hazel", "Ivory", "Jade", "Kelp", "Linen")


def write_world(
    folder: Path,
    *,
    users: int,
    items: int,
    min_length: int = 7,
    max_length: int = 14,
    order: float = 0.85,
    more_words: int = 0,
    seed: int = 0,
) -> tuple[Path, Path]:
    """Write `reviews.parquet` (user, item, time in ms) and `items.parquet` (item, title); returns both paths.

    Args:
        min_length: shortest history; lengths are uniform up to `max_length`.
        order: probability that the next item is the successor of the last one.
        more_words: titles are longer by up to this many words.
    """
    rng = np.random.default_rng(seed)
    successor = rng.permutation(items)
    length_U = rng.integers(min_length, max_length + 1, users)
    steps = int(max_length)
    item_UL = np.empty((users, steps), np.int64)
    item_UL[:, 0] = rng.integers(0, items, users)
    for step in range(1, steps):
        follows = rng.random(users) < order
        item_UL[:, step] = np.where(follows, successor[item_UL[:, step - 1]], rng.integers(0, items, users))
    time_UL = _START_MS + np.cumsum(rng.integers(1, 30 * _DAY_MS, (users, steps)), axis=1)
    real_UL = np.arange(steps)[None, :] < length_U[:, None]
    user_UL = np.broadcast_to(np.arange(users)[:, None], real_UL.shape)
    folder.mkdir(parents=True, exist_ok=True)
    reviews, catalog = folder / "reviews.parquet", folder / "items.parquet"
    # Ids are formatted as columns: a list of a hundred million Python strings would not fit into memory.
    pl.DataFrame({"user": user_UL[real_UL], "item": item_UL[real_UL], "time": time_UL[real_UL]}).with_columns(
        pl.format("u{}", "user"), pl.format("i{}", "item")
    ).write_parquet(reviews)
    titles = [f"{_WORDS[i % 12]} {_WORDS[i // 12 % 12]} No. {i}" for i in range(items)]
    if more_words:
        longer = np.random.default_rng((seed, 1))
        titles = [f"{title} {' '.join(longer.choice(_WORDS, longer.integers(1, more_words + 1)))}" for title in titles]
    pl.DataFrame({"item": [f"i{item}" for item in range(items)], "title": titles}).write_parquet(catalog)
    return reviews, catalog
