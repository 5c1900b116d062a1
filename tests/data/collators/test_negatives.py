"""Sampled negatives: in range, never an excluded item, and a pure function of seed, epoch and user."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from data_helpers import chi_square, ints, light, of_items
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.collators import negatives
from trainer.data.collators.negatives import draw_negatives
from trainer.data.reading.counter_rng import IntArray

rejection_rounds = st.sampled_from([1, 2, 200])
"""With few rounds the list of what is left is drawn from, which otherwise only owners of all items reach."""


@st.composite
def owners(draw: st.DrawFn) -> tuple[int, list[list[int]], int, bool]:
    """(number of items, items of each user, draws, distinct), such that enough items are left to draw."""
    num_items = draw(st.integers(2, 12))
    distinct = draw(st.booleans())
    draws = draw(st.integers(1, num_items - 1 if distinct else 9))
    kept = draws if distinct else 1
    owned = st.permutations(range(1, num_items + 1)).flatmap(
        lambda order: st.integers(0, num_items - kept).map(lambda count: [*order[:count], *order[: count // 2]])
    )
    return num_items, draw(st.lists(owned, max_size=5)), draws, distinct


@light
@given(owners(), rejection_rounds)
def test_a_large_catalog_draws_as_a_small_one(case: tuple[int, list[list[int]], int, bool], rounds: int) -> None:
    """By binary search instead of a bitmap."""
    users = list(range(len(case[1])))
    small = drawn(case, users, rounds, 7)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(negatives, "_MAX_BITMAP", -1)
        assert drawn(case, users, rounds, 7).tolist() == small.tolist()


def drawn(case: tuple[int, list[list[int]], int, bool], users: list[int], rounds: int, *address: int) -> IntArray:
    num_items, owned, draws, distinct = case
    forbidden = of_items(*(owned[user] for user in users), user_U=[10 + user for user in users])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(negatives, "_MAX_ROUNDS", rounds)
        return draw_negatives(forbidden, draws, num_items=num_items, distinct=distinct, address=address)


@light
@given(owners(), rejection_rounds)
def test_allowed_and_distinct(case: tuple[int, list[list[int]], int, bool], rounds: int) -> None:
    num_items, owned, draws, distinct = case
    negative_BK = drawn(case, list(range(len(owned))), rounds, 7)
    assert negative_BK.shape == (len(owned), draws)
    for own, row in zip(owned, negative_BK.tolist(), strict=True):
        assert set(row) <= set(range(1, num_items + 1)) - set(own)
        if distinct:
            assert len(set(row)) == draws


@light
@given(owners(), rejection_rounds, st.data())
def test_draws_of_a_user_do_not_depend_on_other_users(
    case: tuple[int, list[list[int]], int, bool], rounds: int, data: st.DataObject
) -> None:
    everyone = list(range(len(case[1])))
    some = data.draw(st.permutations(everyone))[:3]
    assert drawn(case, some, rounds, 7).tolist() == drawn(case, everyone, rounds, 7)[ints(some)].tolist()


@light
@given(st.integers(1, 30), st.integers(1, 30), rejection_rounds)
def test_more_positions_do_not_change_the_first_draws(few: int, more: int, rounds: int) -> None:
    """The padded length of a batch sets the number of draws, and must not change a user's negatives."""
    owned = [[1, 2, 3], [4], [], list(range(1, 10))]
    short, long = (drawn((10, owned, n, False), [0, 1, 2, 3], rounds, 5, 6) for n in sorted((few, few + more)))
    assert short.tolist() == long[:, :few].tolist()


def test_pinned_draws() -> None:
    """A resumed run must draw the same negatives as without the stop, so these values must never change."""
    forbidden = of_items([1, 2], [3], user_U=[100, 200])
    draw = partial(draw_negatives, forbidden, 5, num_items=8, address=(1, 0))
    assert draw(distinct=True).tolist() == [[7, 4, 8, 3, 5], [8, 1, 7, 5, 4]]
    assert draw(distinct=False).tolist() == [[7, 7, 8, 3, 5], [8, 1, 7, 5, 4]]


@pytest.mark.parametrize("distinct", [True, False])
def test_epochs_seeds_and_users_differ(distinct: bool) -> None:
    same = [[1, 2]] * 4
    rows = {
        tuple(row)
        for seed in range(3)
        for epoch in range(3)
        for row in drawn((1000, same, 5, distinct), [0, 1, 2, 3], 200, seed, epoch).tolist()
    }
    assert len(rows) == 36


@pytest.mark.parametrize("distinct", [True, False])
@pytest.mark.parametrize("rounds", [1, 200])
def test_uniform(distinct: bool, rounds: int) -> None:
    """Over many users, each allowed item is drawn equally often, at every position and on both code paths."""
    users, owned = 6000, [2, 3, 11]
    forbidden = of_items(*[owned] * users)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(negatives, "_MAX_ROUNDS", rounds)
        negative_BK = draw_negatives(forbidden, 3, num_items=12, distinct=distinct, address=(1, 2))
    allowed = sorted(set(range(1, 13)) - set(owned))
    for place in range(3):
        assert chi_square(np.bincount(negative_BK[:, place], minlength=13)[allowed]) < 5
    pair = np.bincount(negative_BK[:, 0] * 13 + negative_BK[:, 1], minlength=169).reshape(13, 13)[allowed][:, allowed]
    off_diagonal = pair[~np.eye(len(allowed), dtype=bool)]
    assert chi_square(off_diagonal) < 5
    assert (np.trace(pair) == 0) == distinct


def test_users_who_own_nearly_everything() -> None:
    """With the real limit on rounds: rejection sampling alone would need 2,500 proposals per draw."""
    num_items, left = 5000, [17, 4999]
    own = [item for item in range(1, num_items + 1) if item not in left]
    forbidden = of_items(own, [1], own)
    distinct = draw_negatives(forbidden, 2, num_items=num_items, distinct=True, address=(0, 0))
    assert sorted(distinct[0]) == sorted(distinct[2]) == left
    repeating = draw_negatives(forbidden, 50, num_items=num_items, distinct=False, address=(0, 0))
    assert set(repeating[0].tolist()) == set(left)
    assert repeating[0].tolist() != repeating[2].tolist()


@pytest.mark.parametrize(("draws", "distinct", "left"), [(3, True, 2), (1, True, 0), (5, False, 0)])
def test_too_few_items(draws: int, distinct: bool, left: int) -> None:
    forbidden = of_items([1], [*range(1, 11 - left), 1])
    with pytest.raises(ValueError, match=rf"only {left} of 10 items .*train_candidates"):
        draw_negatives(forbidden, draws, num_items=10, distinct=distinct, address=(0,))


def test_exactly_enough_items() -> None:
    assert draw_negatives(of_items([1]), 9, num_items=10, distinct=True, address=(0,)).shape == (1, 9)
    assert draw_negatives(of_items([*range(1, 10)]), 3, num_items=10, distinct=False, address=(0,)).tolist() == [
        [10] * 3
    ]


def test_no_users_draw_nothing() -> None:
    for distinct in (True, False):
        assert draw_negatives(of_items(), 4, num_items=5, distinct=distinct, address=(0,)).shape == (0, 4)
