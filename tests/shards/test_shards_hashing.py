import numpy as np
import polars as pl

from shards.hashing import hash_strings, stream_key
from shards.splitmix import draw


def test_hashes_never_change() -> None:
    """Pinned: a different value would silently change the users, ties and candidates of every dataset."""
    key = stream_key(0, "users")
    assert int(key) == 0x2CE51F80EA7BDE77
    assert hash_strings(pl.Series(["", "a", "Zoë", "B00CAG22C6"]), key).tolist() == [
        13533110798498494633,
        2512487727938642881,
        17159672211070186396,
        16416638940422235728,
    ]
    assert draw(np.array([key]), np.array([7], dtype=np.uint64)).tolist() == [8064022094403430827]


def test_a_hash_depends_on_the_string_alone() -> None:
    key = stream_key(3, "x")
    words = [f"{'long' * (n % 5)}-{n}-é" for n in range(200)]
    whole = hash_strings(pl.Series(words), key)
    assert len(set(whole.tolist())) == 200
    assert hash_strings(pl.Series(words)[50:90], key).tolist() == whole[50:90].tolist()
    assert hash_strings(pl.Series(words[::-1]), key).tolist() == whole[::-1].tolist()
    assert hash_strings(pl.concat([pl.Series(words[:9]), pl.Series(words[9:])], rechunk=False), key).tolist() == (
        whole.tolist()
    )
    assert hash_strings(pl.Series([], dtype=pl.String), key).tolist() == []


def test_hashes_of_counting_ids_are_even_and_streams_unrelated() -> None:
    ids = pl.Series([str(n) for n in range(20_000)])
    first = hash_strings(ids, stream_key(0, "a")) / 2.0**64
    second = hash_strings(ids, stream_key(0, "b")) / 2.0**64
    counts, _ = np.histogram(first, bins=20, range=(0, 1))
    assert ((counts - 1000) ** 2 / 1000).sum() < 50  # chi-square, 19 degrees of freedom: p < 1e-4
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.03
    assert abs(np.corrcoef(first, np.arange(20_000))[0, 1]) < 0.03
