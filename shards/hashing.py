"""64-bit hashes of strings that are the same on every machine and in every library version.

The hashes of polars and Python may change between releases, which would silently change every dataset.
"""

import hashlib

import numpy as np
import polars as pl

from shards.splitmix import UInt64Array, mix

_FNV_OFFSET = np.uint64(0xCBF29CE484222325)
_FNV_PRIME = np.uint64(0x100000001B3)


def stream_key(seed: int, stream: str) -> np.uint64:
    """Derive the key of a purpose (`stream`) from a seed, so that different purposes draw independent numbers."""
    digest = hashlib.blake2b(f"{seed}/{stream}".encode(), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))


def hash_strings(values: pl.Series, key: np.uint64) -> UInt64Array:
    """Keyed hash of each string: FNV-1a over its UTF-8 bytes, then SplitMix64. Nulls are not allowed."""
    array = values.to_arrow(compat_level=pl.CompatLevel.oldest())
    if len(array) == 0:
        return np.empty(0, dtype=np.uint64)
    _, offset_buffer, data_buffer = array.buffers()
    offsets = np.frombuffer(offset_buffer, dtype=np.int64)[array.offset : array.offset + len(array) + 1]
    data = np.frombuffer(data_buffer, dtype=np.uint8) if data_buffer is not None else np.empty(0, np.uint8)
    lengths = np.diff(offsets)
    hashes = np.full(len(array), _FNV_OFFSET, dtype=np.uint64)
    active = np.arange(len(array))
    # FNV-1a is sequential within a string, so this is vectorised over strings: one pass per byte position, over the
    # strings that reach it. About 5 million ids per second.
    for position in range(int(lengths.max())):
        active = active[lengths[active] > position]
        hashes[active] = (hashes[active] ^ data[offsets[active] + position]) * _FNV_PRIME
    return mix(mix(hashes + key) + key)
