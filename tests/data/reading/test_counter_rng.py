"""Counter-based random numbers: each is a hash of its address (seed, epoch, user, position)."""

from __future__ import annotations

import numpy as np
import pytest
from data_helpers import chi_square, light
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.reading.counter_rng import hash64, permutation, torch_seed, uniform_integers

MASK = 2**64 - 1


def plain_hash(*address: int) -> int:
    """SplitMix64 in Python integers."""
    state = 0
    for part in address:
        state = (state + 0x9E3779B97F4A7C15 * ((part & MASK) + 1)) & MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
        state ^= state >> 31
    return state


def test_pinned_values() -> None:
    """These must never change: the order, negatives and shuffles of every run depend on them."""
    assert int(hash64(0)[0]) == 0xE220A8397B1DCDAF  # the first output of the published SplitMix64 with seed 0
    assert [int(hash64(*address)[0]) for address in [(1, 2), (2, 1), (0, 0, 0)]] == [
        16216609496213459576,
        15013291540588925986,
        2558736989570252433,
    ]
    assert permutation(8, 3, 1).tolist() == [1, 0, 6, 4, 3, 2, 7, 5]
    assert torch_seed(1, 2) == 16216609496213459576 >> 1


@light
@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=4))
def test_equals_the_arithmetic(address: list[int]) -> None:
    assert int(hash64(*address)[0]) == plain_hash(*address)


@light
@given(
    st.integers(0, 2**40),
    st.lists(st.integers(0, 2**40), min_size=1, max_size=4),
    st.lists(st.integers(0, 99), min_size=1, max_size=3),
)
def test_a_broadcast_equals_single_calls(seed: int, users: list[int], draws: list[int]) -> None:
    together = hash64(seed, np.array(users)[:, None], np.array(draws)[None, :])
    assert together.shape == (len(users), len(draws))
    assert together.tolist() == [[plain_hash(seed, user, draw) for draw in draws] for user in users]


def test_no_elements_give_no_words() -> None:
    assert hash64(1, np.zeros((0, 3), np.int64)).shape == (0, 3)
    assert permutation(0, 1).tolist() == []


@light
@given(st.integers(0, 200), st.integers(0, 2**63), st.integers(0, 50))
def test_permutation_is_a_permutation(length: int, seed: int, epoch: int) -> None:
    assert sorted(permutation(length, seed, epoch).tolist()) == list(range(length))


def test_every_order_is_equally_likely() -> None:
    orders = [tuple(permutation(4, seed).tolist()) for seed in range(4800)]
    count = np.unique(np.array(orders), axis=0, return_counts=True)[1]
    assert len(count) == 24
    assert chi_square(count) < 5


@light
@given(st.integers(1, 10**6), st.integers(0, 2**63))
def test_integers_are_in_range(high: int, seed: int) -> None:
    drawn = uniform_integers(high, seed, np.arange(50))
    assert drawn.dtype == np.int64
    assert 0 <= drawn.min() <= drawn.max() < high


@pytest.mark.parametrize("part", [0, 1, 2, 3])
def test_neighbours_are_independent(part: int) -> None:
    """Draws of neighbouring seeds, epochs, users and positions fill an 8 x 8 table evenly."""
    grid = np.meshgrid(np.arange(4), np.arange(4), np.arange(60), np.arange(60), indexing="ij")
    after = [axis + (number == part) for number, axis in enumerate(grid)]
    pair = uniform_integers(8, *grid) * 8 + uniform_integers(8, *after)
    assert chi_square(np.bincount(pair.ravel(), minlength=64)) < 5


def test_order_of_the_address_matters() -> None:
    word = hash64(np.arange(300)[:, None], np.arange(300)[None, :])
    assert len(np.unique(word)) == 300 * 300


@light
@given(st.lists(st.integers(0, 2**63), min_size=1, max_size=3))
def test_torch_seed_has_63_bits(address: list[int]) -> None:
    assert torch_seed(*address) == plain_hash(*address) >> 1
    assert 0 <= torch_seed(*address) < 2**63
