"""Paired tests against exact enumeration, a library's numbers worked out by hand, and known properties."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from trainer.evaluation.significance import holm, mean_over_seeds, relative_change, sign_flip_p


def test_the_permutation_test_is_that_of_all_sign_patterns() -> None:
    rng = np.random.default_rng(3)
    first_U, second_U = rng.random(9), rng.random(9)
    difference_U = first_U - second_U
    means = [abs(np.dot(signs, difference_U)) for signs in product((-1, 1), repeat=9)]
    exact = np.mean([mean >= abs(difference_U.sum()) - 1e-12 for mean in means])
    assert sign_flip_p(first_U, second_U, resamples=40_000) == pytest.approx(exact, abs=0.01)


def test_p_values_at_their_ends() -> None:
    """Equal systems give 1, clearly different ones the smallest p-value that this many resamples can tell."""
    value_U = np.linspace(0, 1, 200)
    assert sign_flip_p(value_U, value_U) == 1.0
    assert sign_flip_p(value_U + 0.1, value_U, resamples=999) == pytest.approx(1 / 1000)
    assert sign_flip_p(value_U, value_U + 0.1, resamples=999) == pytest.approx(1 / 1000)


def test_the_level_of_the_test_is_kept() -> None:
    """About five in a hundred pairs of equal systems are told apart at the level of 5 %."""
    rng = np.random.default_rng(0)
    found = [sign_flip_p(rng.random(60), rng.random(60), seed=trial, resamples=400) for trial in range(300)]
    assert 0.02 < np.mean([p <= 0.05 for p in found]) < 0.09


def test_holm() -> None:
    """The smallest of four is multiplied by four, the next by three; never less than one before; at most 1."""
    found = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.9})
    assert found == pytest.approx({"a": 0.04, "b": 0.09, "c": 0.09, "d": 0.9})
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


def test_a_relative_change_pairs_its_users() -> None:
    """A change that is the same for every user has no width, however much users differ."""
    before_U = np.random.default_rng(1).random(100)
    found = relative_change(before_U, 0.9 * before_U)
    assert (found.value, found.low, found.high) == pytest.approx((-0.1, -0.1, -0.1))
    apart = relative_change(before_U, 0.9 * before_U[::-1])
    assert apart.value == pytest.approx(-0.1)
    assert apart.low < -0.15 < -0.05 < apart.high


def test_what_cannot_be_compared() -> None:
    two, three = np.ones(2), np.ones(3)
    with pytest.raises(ValueError, match="the same users, at least one: got 2 and 3"):
        sign_flip_p(two, three)
    with pytest.raises(ValueError, match="got 2 and 3"):
        relative_change(two, three)
    with pytest.raises(ValueError, match="no relative change"):
        relative_change(np.zeros(2), two)
    with pytest.raises(ValueError, match="different users"):
        mean_over_seeds([two, three])
    assert mean_over_seeds([two, 2 * two]).tolist() == [1.5, 1.5]
