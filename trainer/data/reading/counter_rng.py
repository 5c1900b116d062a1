"""Counter-based random numbers: each one is a hash of its address.

The address says where the number is used, for example `(seed, epoch, user, draw)`. A number therefore does not depend
on earlier draws, on the rank that draws it or on where a run was interrupted, and whole arrays are drawn at once.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from shards.splitmix import UInt64Array, draw

IntArray = npt.NDArray[np.int64]


def hash64(*address: int | npt.NDArray[np.integer]) -> UInt64Array:
    """Uniform 64-bit words, one per broadcast element of the address; (1,) if all parts are scalars.

    SplitMix64 absorbs the address part by part.
    """
    state: UInt64Array = np.zeros(1, np.uint64)
    for part in address:
        state = draw(state, np.asarray(part).astype(np.uint64))
    return state


def uniform_integers(high: int, *address: int | npt.NDArray[np.integer]) -> IntArray:
    """Uniform integers in `[0, high)`, one per broadcast element; the modulo bias is below high / 2^64."""
    return (hash64(*address) % np.uint64(high)).astype(np.int64)


def integers_below(high: IntArray, *address: int | npt.NDArray[np.integer]) -> IntArray:
    """Uniform integers in `[0, high)`, with a separate bound per element."""
    return (hash64(*address) % high.astype(np.uint64)).astype(np.int64)


def permutation(length: int, *address: int) -> IntArray:
    """A random permutation of `range(length)`: the argsort of its elements' hashes."""
    # Stable, because numpy's default sort may order equal hashes differently on different CPUs.
    return np.argsort(hash64(*address, np.arange(length)), kind="stable")


def torch_seed(*address: int) -> int:
    """A seed for `torch.manual_seed`: 63 bits, which fit its signed 64-bit argument."""
    return int(hash64(*address)[0] >> np.uint64(1))
