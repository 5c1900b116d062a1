"""Raw user ids of a dataset; torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from shards.manifest import DatasetError
from trainer.data.reading.counter_rng import IntArray
from trainer.data.reading.dataset import read_user_ids

_SHOWN = 3


def find_users(path: Path, raw_ids: Sequence[str]) -> IntArray:
    """User indices of raw user ids, in order.

    Raises:
        DatasetError: users that are not in the dataset, or a damaged table of users.
    """
    index = {raw_id: user for user, raw_id in enumerate(read_user_ids(path))}
    missing = list(dict.fromkeys(raw_id for raw_id in raw_ids if raw_id not in index))
    if missing:
        shown = ", ".join(repr(raw_id[:80]) for raw_id in missing[:_SHOWN]) + (", ..." if len(missing) > _SHOWN else "")
        if len(missing) == 1:
            raise DatasetError(
                f"user {shown} is not in {path}: no review has this user id, or too few do; {path}/users.parquet lists "
                "the users, and --history serves anyone by what they have seen"
            )
        raise DatasetError(
            f"{len(missing)} of {len(raw_ids)} users are not in {path} ({shown}): {path}/users.parquet lists the "
            "users; take these out, or serve them by their histories"
        )
    return np.array([index[raw_id] for raw_id in raw_ids], np.int64)
