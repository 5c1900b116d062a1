"""Keeps a part of the users: by a seeded hash of the raw id, or as the paper's code does."""

import random
from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np
import polars as pl

from shards.hashing import hash_strings, stream_key

Sample = Literal["hash", "official"]
"""`hash`: users whose seeded hash is below the fraction, so that a larger sample holds the smaller ones and the order
of lines does not matter. `official`: `random.sample` over the users in the order in which they first appear in the
train, then the valid, then the test file, with seed 0 whatever `--seed` is (SeqRec/sasrec/data_preprocess.py)."""


def sampler(
    sample: Sample, fraction: float, seed: int, frames: Callable[[], Iterator[pl.DataFrame]]
) -> Callable[[pl.DataFrame], pl.DataFrame]:
    """A function that keeps the rows of the sampled users.

    Args:
        frames: reads all rows in the order of the input; called only where all users must be known.
    """
    if fraction >= 1.0:
        return lambda frame: frame
    if sample == "hash":
        key, limit = stream_key(seed, "sample"), np.uint64(int(fraction * 2**64))

        def below(frame: pl.DataFrame) -> pl.DataFrame:
            users = frame["user"].unique()
            kept = users.filter(pl.Series(hash_strings(users, key) < limit))
            return frame.join(pl.DataFrame({"user": kept}), on="user", how="semi")

        return below
    seen = [frame["user"].unique(maintain_order=True) for frame in frames()]
    users = pl.concat(seen or [pl.Series("user", [], pl.String)]).unique(maintain_order=True)
    places = random.Random(0).sample(range(len(users)), int(len(users) * fraction))
    kept = pl.DataFrame({"user": users.gather(places)})
    return lambda frame: frame.join(kept, on="user", how="semi")
