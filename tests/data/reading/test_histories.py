"""Columnar histories against lists of Python tuples."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from data_helpers import Event, Lists, event_lists, histories, ints, light, to_lists, users_of
from hypothesis import given
from hypothesis import strategies as st

from trainer.config import Split, TrainingOrder
from trainer.data.reading.histories import Histories, Users

held_out = st.one_of(st.just((0, 0)), st.tuples(st.integers(1, 30), st.integers(0, 2**41)))


@st.composite
def worlds(draw: st.DrawFn) -> tuple[Lists, list[Event], list[Event]]:
    """Users with or without a validation item, a test item or a history."""
    lists = draw(event_lists)
    some = st.lists(held_out, min_size=len(lists), max_size=len(lists))
    return lists, draw(some), draw(some)


def made(world: tuple[Lists, list[Event], list[Event]], first: int = 0) -> Users:
    lists, valid, test = world
    return users_of(histories(lists, range(first, first + len(lists))), valid, test)


@light
@given(event_lists, st.data())
def test_take(lists: Lists, data: st.DataObject) -> None:
    indices = data.draw(st.lists(st.integers(0, len(lists) - 1), max_size=6) if lists else st.just([]))
    taken = histories(lists).take(ints(indices))
    assert to_lists(taken) == [lists[place] for place in indices]
    assert taken.user_U.tolist() == indices
    start, stop = data.draw(st.integers(0, 8)), data.draw(st.integers(0, 8))
    assert to_lists(histories(lists).take(slice(start, stop))) == lists[start:stop]


@light
@given(event_lists, st.integers(0, 9))
def test_last_without_last_and_padded(lists: Lists, length: int) -> None:
    some = histories(lists)
    assert some.length_U.tolist() == [len(user) for user in lists]
    assert to_lists(some.last(length)) == [user[max(len(user) - length, 0) :] for user in lists]
    assert to_lists(some.without_last()) == [user[:-1] for user in lists]
    padded = [([0] * length + [item for item, _ in user])[len(user) :] for user in lists]
    assert some.padded(length).shape == (len(lists), length)
    assert some.padded(length).tolist() == padded


@light
@given(st.lists(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=4), max_size=5))
def test_last_item(lists: Lists) -> None:
    assert histories(lists).last_item_U().tolist() == [user[-1][0] for user in lists]


@light
@given(worlds())
def test_held_out_items(world: tuple[Lists, list[Event], list[Event]]) -> None:
    lists, valid, test = world
    users = made(world)
    before = [user + [event] * (event[0] != 0) for user, event in zip(lists, valid, strict=True)]
    assert to_lists(users.before_test()) == before
    assert to_lists(users.whole()) == [
        user + [event] * (event[0] != 0) for user, event in zip(before, test, strict=True)
    ]
    splits: list[tuple[Split, Lists, list[Event]]] = [("valid", lists, valid), ("test", before, test)]
    for split, read, targets in splits:
        has = [user for user in range(len(lists)) if targets[user][0]]
        history, target_H = users.targets(split)
        assert history.user_U.tolist() == has
        assert to_lists(history) == [read[user] for user in has]
        assert target_H.tolist() == [targets[user][0] for user in has]


@light
@given(st.lists(worlds(), min_size=1, max_size=4), st.data())
def test_concatenate_and_take_users(parts: list[tuple[Lists, list[Event], list[Event]]], data: st.DataObject) -> None:
    first = np.cumsum([0, *(len(lists) for lists, _, _ in parts)])
    users = Users.concatenate([made(part, start) for part, start in zip(parts, first[:-1], strict=True)])
    lists, valid, test = ([row for part in parts for row in part[column]] for column in range(3))
    assert len(users) == first[-1]
    indices = data.draw(st.permutations(range(len(users))))[:5]
    for some, at in ((users, list(range(len(users)))), (users.take(ints(indices)), list(indices))):
        assert some.train.user_U.tolist() == at
        assert to_lists(some.train) == [lists[user] for user in at]
        assert list(zip(some.valid_item_U.tolist(), some.valid_time_U.tolist(), strict=True)) == [valid[u] for u in at]
        assert list(zip(some.test_item_U.tolist(), some.test_time_U.tolist(), strict=True)) == [test[u] for u in at]


@light
@given(worlds(), st.data())
def test_contexts_are_part_of_the_histories_behind_them(
    world: tuple[Lists, list[Event], list[Event]], data: st.DataObject
) -> None:
    lists, valid, test = world
    same_size = st.lists(st.lists(st.tuples(st.integers(1, 30), st.integers(0, 9)), max_size=3), min_size=len(lists))
    to_valid, to_test = (data.draw(same_size)[: len(lists)] for _ in range(2))
    users = replace(made(world), valid_context=histories(to_valid), test_context=histories(to_test))
    index = data.draw(st.permutations(range(len(lists))))
    users = users.take(ints(index))
    parts = [(lists[u], to_valid[u], [valid[u]] * (valid[u][0] > 0), to_test[u], test[u]) for u in index]
    found, target_U = users.targets("valid")
    assert to_lists(found) == [train + context for train, context, target, _, _ in parts if target]
    assert target_U.tolist() == [target[0][0] for _, _, target, _, _ in parts if target]
    found, _ = users.targets("test")
    assert to_lists(found) == [a + b + c + d for a, b, c, d, target in parts if target[0]]
    assert to_lists(users.whole()) == [a + b + c + d + [e] * (e[0] > 0) for a, b, c, d, e in parts]
    twice = Users.concatenate([users, users])
    assert to_lists(twice.whole()) == 2 * to_lists(users.whole())


@light
@given(event_lists, st.integers(0, 2**62), st.data())
def test_shuffled_keeps_items_and_times(lists: Lists, seed: int, data: st.DataObject) -> None:
    some = histories(lists, [3 * user for user in range(len(lists))])
    mixed = some.shuffled(seed)
    assert mixed.user_U.tolist() == some.user_U.tolist()
    assert mixed.time_E.tolist() == some.time_E.tolist()
    for old, new in zip(to_lists(some), to_lists(mixed), strict=True):
        assert sorted(item for item, _ in old) == sorted(item for item, _ in new)
    # A user's order does not depend on the other users of the batch.
    indices = ints(data.draw(st.permutations(range(len(lists))))[:3])
    assert to_lists(some.take(indices).shuffled(seed)) == to_lists(mixed.take(indices))


def test_shuffled_mixes_and_depends_on_seed_and_user() -> None:
    items = [[(item, item) for item in range(1, 11)]] * 50
    orders = {tuple(item for item, _ in user) for seed in (0, 1) for user in to_lists(histories(items).shuffled(seed))}
    assert len(orders) == 100
    # Each item comes first about equally often.
    first = [order[0] for order in orders]
    assert set(first) == set(range(1, 11))


def test_no_users() -> None:
    nobody: Histories = histories([])
    assert nobody.padded(3).shape == (0, 3)
    assert nobody.last_item_U().tolist() == []
    assert to_lists(nobody.shuffled(0)) == []


@pytest.mark.parametrize("has", [[], [0], [1], [0, 1, 2]])
def test_mask_index(has: list[int]) -> None:
    mask = np.isin(np.arange(3), has)
    taken = histories([[(1, 1)], [], [(2, 2)]]).take(mask)  # type: ignore[arg-type]  # works, but nothing needs it
    assert taken.user_U.tolist() == has


ORDERS = ("original", "window", "history", "sequence")


@light
@given(worlds(), st.sampled_from(ORDERS), st.integers(0, 5))
def test_training_order(world: tuple[Lists, list[Event], list[Event]], order: TrainingOrder, read: int) -> None:
    """What may move, and what stays: times, held-out items, and for all but `sequence` the last item."""
    users = made(world)
    found = users.in_training_order(order, read, seed=3)
    assert [[time for _, time in user] for user in to_lists(found.train)] == [[time for _, time in u] for u in world[0]]
    assert (found.test_item_U.tolist(), found.valid_item_U.tolist()) == (
        [t for t, _ in world[2]],
        [v for v, _ in world[1]],
    )
    for before, after in zip(to_lists(users.train), to_lists(found.train), strict=True):
        items, moved = [item for item, _ in before], [item for item, _ in after]
        last = len(items) if order == "sequence" else max(len(items) - 1, 0)
        first = {"original": last, "window": max(last - read, 0)}.get(order, 0)
        assert moved[:first] + moved[last:] == items[:first] + items[last:]
        assert sorted(moved[first:last]) == sorted(items[first:last])


def test_training_order_is_drawn_once_per_user() -> None:
    """It depends on seed and user alone: not on the batch that the user is in; and users differ."""
    lists: Lists = [[(item, item) for item in range(1, 21)]] * 3
    users = made((lists, [(0, 0)] * 3, [(0, 0)] * 3))
    orders = [[item for item, _ in row] for row in to_lists(users.in_training_order("sequence", 9, seed=1).train)]
    assert len({tuple(order) for order in [*orders, list(range(1, 21))]}) == 4
    [alone] = to_lists(users.take(ints([2])).in_training_order("sequence", 1, seed=1).train)
    assert [item for item, _ in alone] == orders[2]
    other = to_lists(users.in_training_order("sequence", 9, seed=2).train)
    assert [item for item, _ in other[0]] != orders[0]


@light
@given(worlds(), worlds())
def test_repeated_items_have_their_latest_date(
    world: tuple[Lists, list[Event], list[Event]], contexts: tuple[Lists, list[Event], list[Event]]
) -> None:
    users, (lists, valid, test) = made(world), world
    later = (contexts[0] + [[]] * len(lists))[: len(lists)]
    users = replace(users, valid_context=histories(later), test_context=histories([[]] * len(lists)))
    dated = users.dated("last")
    assert users.dated("own") is users
    held = [[event] if event[0] else [] for event in (*valid, *test)]
    for row, (user, between) in enumerate(zip(lists, later, strict=True)):
        latest: dict[int, int] = {}
        for item, time in [*user, *between, *held[row], *held[row + len(lists)]]:
            latest[item] = max(time, latest.get(item, time))
        assert to_lists(dated.train)[row] == [(item, latest[item]) for item, _ in user]
        assert dated.valid_context is not None
        assert to_lists(dated.valid_context)[row] == [(item, latest[item]) for item, _ in between]
        assert dated.valid_time_U[row] == latest.get(valid[row][0], 0)
        assert dated.test_time_U[row] == latest.get(test[row][0], 0)
    assert dated.test_item_U.tolist() == users.test_item_U.tolist()
