"""SplitMix64 (Steele, Lea and Flood 2014), the one generator behind everything random here; numpy alone.

A random number is a hash of its address, so that it is the same on every machine, in every version of a library and in
whatever order numbers are drawn.
"""

import numpy as np
import numpy.typing as npt

UInt64Array = npt.NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(word: UInt64Array) -> UInt64Array:
    """The finaliser: every input bit changes every output bit with probability one half."""
    mixed = word ^ (word >> np.uint64(30))
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed


def draw(key: UInt64Array | np.uint64, counter: UInt64Array) -> UInt64Array:
    """Number `counter`, from 0, of the sequence that starts at `key`; arithmetic modulo 2^64."""
    with np.errstate(over="ignore"):
        return mix(key + (counter + np.uint64(1)) * _GOLDEN)
