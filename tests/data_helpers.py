"""Convert users from and to plain lists, so that tests need not spell out offsets."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from trainer.data.reading.counter_rng import IntArray
from trainer.data.reading.histories import Histories, Users

# A fixed seed: without it, these tests would be flaky.
light = settings(
    deadline=None, max_examples=60, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

Event = tuple[int, int]
Lists = list[list[Event]]


def ints(values: Sequence[int]) -> IntArray:
    return np.array(values, np.int64)


def histories(lists: Sequence[Sequence[Event]], user_U: Sequence[int] | None = None) -> Histories:
    """Histories from (item, time) lists; user indices are 0, 1, ... unless given."""
    events = [event for user in lists for event in user]
    return Histories(
        ints(range(len(lists)) if user_U is None else user_U),
        ints([sum(map(len, lists[:n])) for n in range(len(lists) + 1)]),
        ints([item for item, _ in events]),
        ints([time for _, time in events]),
    )


def of_items(*lists: Sequence[int], user_U: Sequence[int] | None = None) -> Histories:
    """Histories from item lists, one event per day."""
    return histories([[(item, day * 86_400_000) for day, item in enumerate(user)] for user in lists], user_U)


def users_of(train: Histories, valid: Sequence[Event], test: Sequence[Event]) -> Users:
    return Users(
        train,
        ints([item for item, _ in valid]),
        ints([time for _, time in valid]),
        ints([item for item, _ in test]),
        ints([time for _, time in test]),
    )


def without_held_out(train: Histories) -> Users:
    nothing = [(0, 0)] * len(train)
    return users_of(train, nothing, nothing)


def to_lists(some: Histories) -> Lists:
    """Convert back to (item, time) lists, and check that the columns are consistent."""
    assert some.offset_U1[0] == 0
    assert some.offset_U1[-1] == len(some.item_E) == len(some.time_E)
    assert len(some.offset_U1) == len(some.user_U) + 1
    assert {column.dtype for column in (some.user_U, some.offset_U1, some.item_E, some.time_E)} == {np.dtype(np.int64)}
    bounds = zip(some.offset_U1[:-1], some.offset_U1[1:], strict=True)
    return [list(zip(some.item_E[a:b].tolist(), some.time_E[a:b].tolist(), strict=True)) for a, b in bounds]


def chi_square(count: IntArray) -> float:
    """Chi-square statistic against equal expected counts, in standard deviations above its mean."""
    expected = count.sum() / count.size
    freedom = count.size - 1
    return float((((count - expected) ** 2 / expected).sum() - freedom) / (2 * freedom) ** 0.5)


events = st.tuples(st.integers(1, 30), st.integers(0, 2**41))
event_lists = st.lists(st.lists(events, max_size=7), max_size=8)
"""A few users with short histories, some empty."""
