"""Fixed evaluation negatives: drawn without replacement, uniformly over the items that the user never interacted with.

Every draw is addressed by (seed, stream, raw user id, column, attempt), so that a user's negatives do not depend on
other users. With 30,000 items, one core draws 99 negatives for 247,000 users per second, or 19 for 1.2 million.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from shards.hashing import stream_key
from shards.manifest import DatasetError
from shards.partitions.engine import Parts
from shards.sequences import Sequences
from shards.splitmix import UInt64Array, draw

_BLOCK_USERS = 2048
_MAX_ROUNDS = 32
# Odd numbers without a pattern: multiples of 2^32 times the golden ratio and the square root of three.
_ODD_1, _ODD_2 = np.uint32(0x9E3779B1), np.uint32(0xBB67AE85)

Indices = npt.NDArray[np.int64]


class Owned(NamedTuple):
    """Distinct items of each user in all splits: those of user u are `items[offsets[u]:offsets[u+1]]`, ascending."""

    offsets: npt.NDArray[np.int64]
    items: npt.NDArray[np.int64]


def owned_items(sequences: Sequences, num_items: int) -> Owned:
    """Collect the distinct train, validation and test items of each user."""
    users = np.arange(sequences.num_users)
    parts = [(sequences.offsets, sequences.items)]
    if sequences.contexts is not None:
        parts += [(part.offsets, part.items) for part in (sequences.contexts.valid, sequences.contexts.test)]
    part_users = [np.repeat(users, np.diff(offsets)) for offsets, _ in parts]
    all_users = np.concatenate([*part_users, users, users])
    held_out = sequences.valid_items, sequences.test_items
    all_items = np.concatenate([*(items for _, items in parts), *held_out]).astype(np.int64)
    stride = num_items + 1
    # Sort and compare instead of np.unique, which hashes since numpy 2.3: 0.3 s instead of 20 s for ten million keys.
    keys = np.sort((all_users * stride + all_items)[all_items > 0])
    keys = keys[np.diff(keys, prepend=-1) > 0]
    counts = np.bincount(keys // stride, minlength=sequences.num_users)
    return Owned(np.concatenate([[0], np.cumsum(counts)]), keys % stride)


def check_negatives(parts: Parts[Sequences], num_items: int, counts: Mapping[str, int]) -> None:
    """Check that every user has enough items to draw from.

    Args:
        counts: candidates per user, by the command line option that sets them.

    Raises:
        DatasetError: a user has too few, or a count is less than 1.
    """
    for option, count in counts.items():
        if count < 1:
            raise DatasetError(f"{option} {count}: give at least 1")
    most = max(parts.each(partial(_most_items, num_items=num_items, drawn=max(counts.values()))))
    for option, count in counts.items():
        if num_items - most < count:
            raise DatasetError(
                f"{option} {count}: a user with {most:,} of the {num_items:,} items leaves only "
                f"{num_items - most:,} to draw from: lower {option} to at most {max(num_items - most, 0)}"
            )


def _most_items(part: Sequences, num_items: int, drawn: int) -> int:
    """Items of the user who has most of them; 0 if every user leaves enough of them."""
    # Events are at least as many as items, and cheaper to count.
    if not part.num_users or num_items - int(part.lengths.max()) >= drawn:
        return 0
    return int(np.diff(owned_items(part, num_items).offsets).max())


def drawn_negatives(
    part: Sequences, num_items: int, widths: Mapping[str, int], seed: int
) -> dict[str, npt.NDArray[np.int32]]:
    """Negatives (users, width) of consecutive users, by the name of the candidate set.

    Args:
        widths: negatives per user, by the name of the set.
    """
    owned = owned_items(part, num_items)
    return {
        name: np.concatenate(
            [
                np.empty((0, width), np.int32),
                *negative_blocks(owned, part.user_keys, num_items, width, seed=seed, stream=name),
            ]
        )
        for name, width in widths.items()
    }


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
    known = _Known(owned, num_items)
    columns = np.arange(count, dtype=np.uint64)
    drawn = _uniform(keys[:, None], columns, num_items)
    row, column = _clashes(drawn, np.arange(len(keys)), known)
    for attempt in range(1, _MAX_ROUNDS):
        if not len(row):
            return drawn
        drawn[row, column] = _uniform(keys[row], columns[column] + np.uint64(attempt * count), num_items)
        affected = row[np.diff(row, prepend=-1) > 0]  # rows ascend
        where, column = _clashes(drawn[affected], affected, known)
        row = affected[where]
    # Users who have almost all items: rejection would take too many rounds.
    for user in np.unique(row):
        own = owned.items[owned.offsets[user] : owned.offsets[user + 1]]
        drawn[user] = _rank_all(own, keys[user : user + 1], num_items, count)
    return drawn


def _uniform(keys: UInt64Array, counters: UInt64Array, num_items: int) -> npt.NDArray[np.int32]:
    # The top 32 bits, scaled to 1..N: biased by less than N / 2^32.
    high = draw(keys, counters) >> np.uint64(32)
    return ((high * np.uint64(num_items)) >> np.uint64(32)).astype(np.int32) + np.int32(1)


def _clashes(drawn: npt.NDArray[np.int32], users: npt.NDArray[np.int64], known: "_Known") -> tuple[Indices, Indices]:
    """Rows and columns of the entries that a user has, or an earlier column of the row; rows ascend."""
    bad = known.has(drawn, users)
    # Most rows have no repeat, which sorting shows at half the cost of finding the columns.
    in_order = np.sort(drawn, axis=1)
    repeats = np.flatnonzero((in_order[:, 1:] == in_order[:, :-1]).any(axis=1))
    bad[repeats] |= _repeated(drawn[repeats].astype(np.int64))
    row, column = np.nonzero(bad)
    return row, column


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


class _Known:
    """Answers which items a user of a block has.

    A table of hashes tells most that he does not have, in a tenth of the time that a search takes.
    """

    def __init__(self, owned: Owned, num_items: int) -> None:
        users = np.repeat(np.arange(len(owned.offsets) - 1), np.diff(owned.offsets))
        self._stride = num_items + 1
        self._keys = owned.items + users * self._stride
        bits = max(int(16 * len(users)).bit_length(), 8)  # at most a sixteenth of the table is set
        self._shift = np.uint32(32 - min(bits, 30))
        self._table = np.zeros(1 << min(bits, 30), np.bool_)
        self._table[self._place(owned.items.astype(np.uint32), users.astype(np.uint32))] = True

    def has(self, items: npt.NDArray[np.int32], users: Indices) -> npt.NDArray[np.bool_]:
        """Mark each of the items (U, C) that its row's user has."""
        found: npt.NDArray[np.bool_] = self._table[self._place(items.view(np.uint32), users[:, None].astype(np.uint32))]
        row, column = np.nonzero(found)
        keys = items[row, column] + users[row] * self._stride
        index = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        found[row, column] = self._keys[index] == keys
        return found

    def _place(self, items: npt.NDArray[np.uint32], users: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
        hashed: npt.NDArray[np.uint32] = (items * _ODD_1 + users * _ODD_2) >> self._shift
        return hashed


def _rank_all(own: npt.NDArray[np.int64], key: UInt64Array, num_items: int, count: int) -> npt.NDArray[np.int64]:
    """Choose the `count` items of lowest random rank, for a user with too few items left to find by drawing."""
    others = np.setdiff1d(np.arange(1, num_items + 1), own)
    # Counters from 2^40 on are not used by `_draw_block`.
    ranks = draw(key, others.astype(np.uint64) + np.uint64(1 << 40))
    chosen: npt.NDArray[np.int64] = others[np.argsort(ranks, kind="stable")[:count]]
    return chosen
