"""Fixed evaluation negatives: drawn without replacement, uniformly over the items that the user never interacted with.

Every draw is addressed by (seed, stream, raw user id, column, attempt), so that a user's negatives do not depend on
other users. With 30,000 items, one core draws 99 negatives for 114,000 users per second, or 19 for 670,000.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from shards.hashing import stream_key
from shards.manifest import DatasetError
from shards.sequences import Sequences
from shards.splitmix import UInt64Array, draw

_BLOCK_USERS = 2048
_MAX_ROUNDS = 32


class Owned(NamedTuple):
    """Distinct items of each user in all splits: those of user u are `items[offsets[u]:offsets[u+1]]`, ascending."""

    offsets: npt.NDArray[np.int64]
    items: npt.NDArray[np.int64]


def owned_items(sequences: Sequences) -> Owned:
    """Collect the distinct train, validation and test items of each user."""
    users = np.arange(sequences.num_users)
    parts = [(sequences.offsets, sequences.items)]
    if sequences.contexts is not None:
        parts += [(part.offsets, part.items) for part in (sequences.contexts.valid, sequences.contexts.test)]
    part_users = [np.repeat(users, np.diff(offsets)) for offsets, _ in parts]
    all_users = np.concatenate([*part_users, users, users])
    held_out = sequences.valid_items, sequences.test_items
    all_items = np.concatenate([*(items for _, items in parts), *held_out]).astype(np.int64)
    stride = sequences.num_items + 1
    # Sort and compare instead of np.unique, which hashes since numpy 2.3: 0.3 s instead of 20 s for ten million keys.
    keys = np.sort((all_users * stride + all_items)[all_items > 0])
    keys = keys[np.diff(keys, prepend=-1) > 0]
    counts = np.bincount(keys // stride, minlength=sequences.num_users)
    return Owned(np.concatenate([[0], np.cumsum(counts)]), keys % stride)


def check_negatives(owned: Owned, num_items: int, count: int, option: str) -> None:
    """Check that every user has at least `count` items to draw from.

    Args:
        option: the command line option that sets `count`, for the message.

    Raises:
        DatasetError: a user has too few, or `count` is less than 1.
    """
    if count < 1:
        raise DatasetError(f"{option} {count}: give at least 1")
    most = int(np.diff(owned.offsets).max())
    if num_items - most < count:
        raise DatasetError(
            f"{option} {count}: a user with {most:,} of the {num_items:,} items leaves only "
            f"{num_items - most:,} to draw from: lower {option} to at most {max(num_items - most, 0)}"
        )


def negative_blocks(
    owned: Owned, user_keys: UInt64Array, num_items: int, count: int, *, seed: int, stream: str
) -> Iterator[npt.NDArray[np.int32]]:
    """Yield the negatives of all users, in blocks of consecutive users: int32 item ids, (users of the block, count).

    Args:
        user_keys: hash of each raw user id.
        stream: name of the candidate set; each set has its own draws.
    """
    keys = user_keys ^ stream_key(seed, f"negatives/{stream}")
    for start in range(0, len(keys), _BLOCK_USERS):
        stop = min(start + _BLOCK_USERS, len(keys))
        offsets = owned.offsets[start : stop + 1]
        block = Owned(offsets - offsets[0], owned.items[offsets[0] : offsets[-1]])
        yield _draw_block(block, keys[start:stop], num_items, count)


def _draw_block(owned: Owned, keys: UInt64Array, num_items: int, count: int) -> npt.NDArray[np.int32]:
    """Draw all columns, then redraw those that hit an item of the user or of an earlier column, until none does.

    Only the draw itself depends on item ids, so every set of items is equally likely.
    """
    rows = np.arange(len(keys))
    stride = num_items + 1
    own_keys = owned.items + np.repeat(rows, np.diff(owned.offsets)) * stride
    columns = np.arange(count, dtype=np.uint64)
    drawn = np.empty((len(keys), count), dtype=np.int64)
    row, column = np.divmod(np.arange(drawn.size), count)
    for attempt in range(_MAX_ROUNDS):
        counters = columns[column] + np.uint64(attempt * count)
        # The top 32 bits, scaled to 1..N: biased by less than N / 2^32.
        high = draw(keys[row], counters) >> np.uint64(32)
        drawn[row, column] = ((high * np.uint64(num_items)) >> np.uint64(32)).astype(np.int64) + 1
        affected = np.unique(row)
        bad = _repeated(drawn[affected])
        bad |= _own(drawn[affected] + affected[:, None] * stride, own_keys)
        where, column = np.nonzero(bad)
        row = affected[where]
        if not len(row):
            return drawn.astype(np.int32)
    # Users who have almost all items: rejection would take too many rounds.
    for user in np.unique(row):
        own = owned.items[owned.offsets[user] : owned.offsets[user + 1]]
        drawn[user] = _rank_all(own, keys[user : user + 1], num_items, count)
    return drawn.astype(np.int32)


def _repeated(drawn: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Mark each entry whose value occurs in an earlier column of its row."""
    width = drawn.shape[1]
    # The column in the low bits makes equal values adjacent, earliest column first, with one sort and no argsort.
    bits = max(width - 1, 1).bit_length()
    tagged = np.sort((drawn << bits) | np.arange(width), axis=1)
    again = np.zeros(drawn.shape, dtype=np.bool_)
    later = np.zeros(drawn.shape, dtype=np.bool_)
    later[:, 1:] = (tagged[:, 1:] >> bits) == (tagged[:, :-1] >> bits)
    row, position = np.nonzero(later)
    again[row, tagged[row, position] & ((1 << bits) - 1)] = True
    return again


def _own(keys: npt.NDArray[np.int64], own_keys: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Mark each (user, item) key that occurs in the sorted `own_keys`."""
    index = np.minimum(np.searchsorted(own_keys, keys.ravel()), len(own_keys) - 1)
    found: npt.NDArray[np.bool_] = (own_keys[index] == keys.ravel()).reshape(keys.shape)
    return found


def _rank_all(own: npt.NDArray[np.int64], key: UInt64Array, num_items: int, count: int) -> npt.NDArray[np.int64]:
    """Choose the `count` items of lowest random rank, for a user with too few items left to find by drawing."""
    others = np.setdiff1d(np.arange(1, num_items + 1), own)
    # Counters from 2^40 on are not used by `_draw_block`.
    ranks = draw(key, others.astype(np.uint64) + np.uint64(1 << 40))
    chosen: npt.NDArray[np.int64] = others[np.argsort(ranks, kind="stable")[:count]]
    return chosen
