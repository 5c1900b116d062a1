"""Random numbers with an address.

Each number is a hash of where it is used, for example `(seed, epoch, user, draw)`. So it does not depend on what was
drawn before, on which rank asks or on how a run was interrupted, and whole arrays are drawn at once.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from shards.splitmix import UInt64Array, draw

IntArray = npt.NDArray[np.int64]


def hash64(*address: int | npt.NDArray[np.integer]) -> UInt64Array:
    """Uniform 64-bit words, one for each broadcast element of the address (SplitMix64, absorbed part by part)."""
    state: UInt64Array = np.zeros(1, np.uint64)
    for part in address:
        state = draw(state, np.asarray(part).astype(np.uint64))
    return state


def uniform_integers(high: int, *address: int | npt.NDArray[np.integer]) -> IntArray:
    """Integers in `[0, high)`. The modulo bias is below high / 2^64."""
    return (hash64(*address) % np.uint64(high)).astype(np.int64)


def integers_below(high: IntArray, *address: int | npt.NDArray[np.integer]) -> IntArray:
    """Integers in `[0, high)`, each element with a bound of its own."""
    return (hash64(*address) % high.astype(np.uint64)).astype(np.int64)


def permutation(length: int, *address: int) -> IntArray:
    """A permutation of `range(length)`: the order of the hashes of its elements."""
    return np.argsort(hash64(*address, np.arange(length)), kind="stable")


def torch_seed(*address: int) -> int:
    """A seed for `torch.manual_seed`, which takes 63 bits."""
    return int(hash64(*address)[0] >> np.uint64(1))
