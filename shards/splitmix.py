"""SplitMix64 (Steele, Lea and Flood 2014), the only random number generator of this package; needs numpy only.

Counter-based: a random number is a hash of its address, so that it is the same on every machine, in every library
version and in any order of drawing.
"""

import numpy as np
import numpy.typing as npt

UInt64Array = npt.NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(word: UInt64Array) -> UInt64Array:
    """SplitMix64's finaliser: every input bit flips every output bit with probability one half."""
    mixed = word ^ (word >> np.uint64(30))
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed


def draw(key: UInt64Array | np.uint64, counter: UInt64Array) -> UInt64Array:
    """Draw number `counter` (from 0) of the sequence with state `key`, as uniform uint64; arithmetic is modulo 2^64."""
    with np.errstate(over="ignore"):
        return mix(key + (counter + np.uint64(1)) * _GOLDEN)
