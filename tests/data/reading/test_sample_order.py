"""Sample order as a pure function of seed, epoch and step."""

from __future__ import annotations

from fractions import Fraction
from itertools import chain

import numpy as np
import pytest
from data_helpers import light
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.reading.sample_order import epoch_windows
from trainer.engine.schedule import validations_done
from trainer.runs.batch_shares import num_steps, share, share_sizes

layouts = st.lists(st.integers(1, 40), min_size=1, max_size=12)


def epoch_order(shard_users: list[int], shuffle_shards: int, seed: int, epoch: int) -> list[int]:
    """Users of an epoch in training order; in storage order, shard after shard, they are 0, 1, 2, ..."""
    first = np.cumsum([0, *shard_users])
    order: list[int] = []
    for window in epoch_windows(shard_users, shuffle_shards, seed, epoch):
        assert window.first == len(order)
        users = np.concatenate([np.arange(first[shard], first[shard + 1]) for shard in window.shards])
        order += users[window.order].tolist()
    return order


@light
@given(layouts, st.integers(1, 14), st.integers(0, 2**62), st.integers(0, 99))
def test_every_user_once_per_epoch(shard_users: list[int], shuffle: int, seed: int, epoch: int) -> None:
    assert sorted(epoch_order(shard_users, shuffle, seed, epoch)) == list(range(sum(shard_users)))


@light
@given(layouts, st.integers(1, 14), st.integers(0, 2**62))
def test_a_window_holds_at_most_that_many_shards(shard_users: list[int], shuffle: int, seed: int) -> None:
    windows = epoch_windows(shard_users, shuffle, seed, 0)
    assert [len(window.shards) for window in windows[:-1]] == [shuffle] * (len(windows) - 1)
    assert 1 <= len(windows[-1].shards) <= shuffle


def test_seeds_and_epochs_give_other_orders() -> None:
    orders = {tuple(epoch_order([20] * 6, 2, seed, epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25
    assert epoch_order([20] * 6, 2, 3, 4) == epoch_order([20] * 6, 2, 3, 4)


def test_windows_group_different_shards_each_epoch() -> None:
    """Users are shuffled only within windows of shards, so the windows must change between epochs."""
    met = {
        tuple(sorted(tuple(sorted(window.shards)) for window in epoch_windows([3] * 12, 4, seed, epoch)))
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(met) == 9


def test_both_shards_and_users_are_shuffled() -> None:
    windows = epoch_windows([50] * 40, 4, 0, 0)
    assert [shard for window in windows for shard in window.shards] != list(range(40))
    orders = [window.order.tolist() for window in windows]
    assert all(order != sorted(order) for order in orders)
    assert len({tuple(order) for order in orders}) == len(windows), "windows must not share one order"


@light
@given(st.integers(0, 300), st.integers(1, 64))
def test_shares_are_the_whole_batch(rows: int, world_size: int) -> None:
    shares = [share(rows, rank, world_size) for rank in range(world_size)]
    assert [row for part in shares for row in range(rows)[part]] == list(range(rows))
    sizes = share_sizes(rows, world_size)
    assert sizes == [part.stop - part.start for part in shares]
    assert max(sizes) - min(sizes) <= 1


@light
@given(layouts, st.integers(1, 30), st.integers(1, 9))
def test_global_batches_do_not_depend_on_the_ranks(shard_users: list[int], batch_size: int, world_size: int) -> None:
    """Every rank slices the same order; the ranks' shares, concatenated, are the batches of a single rank."""
    order = epoch_order(shard_users, 3, 1, 2)
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    assert len(batches) == num_steps(len(order), batch_size)
    runs = [[batch[share(len(batch), rank, world_size)] for batch in batches] for rank in range(world_size)]
    assert {len(run) for run in runs} == {len(batches)}
    assert [list(chain(*parts)) for parts in zip(*runs, strict=True)] == batches


@pytest.mark.parametrize(("users", "batch", "steps"), [(0, 5, 0), (1, 5, 1), (5, 5, 1), (6, 5, 2), (10, 5, 2)])
def test_num_steps(users: int, batch: int, steps: int) -> None:
    assert num_steps(users, batch) == steps


@pytest.mark.parametrize("steps", [10, 11, 13, 47, 48, 94, 101, 1003])
@pytest.mark.parametrize("every", [0.1, 0.2, 0.25, 0.3, 0.5, 1.0])
def test_validations_of_epochs(steps: int, every: float) -> None:
    done = [validations_done(step, steps, every) for step in range(3 * steps + 1)]
    assert done[0] == 0
    assert set(np.diff(done)) <= {0, 1}
    for epoch in range(1, 4):
        assert done[epoch * steps] == int(Fraction(epoch) / Fraction(str(every)))
        if (Fraction(epoch) / Fraction(str(every))).denominator == 1:
            assert done[epoch * steps] == done[epoch * steps - 1] + 1, "the last is at the end of the epoch, not later"


def test_intervals_shorter_than_a_step_validate_at_every_step() -> None:
    assert [validations_done(step, 7, 0.1) for step in range(15)] == list(range(15))
    assert [validations_done(step, 10, 0.1) for step in range(15)] == list(range(15))


def test_intervals_of_several_epochs() -> None:
    at = [step for step in range(1, 101) if validations_done(step, 9, 5) > validations_done(step - 1, 9, 5)]
    assert at == [45, 90]
    assert validations_done(13, 9, 1.5) == 0
    assert validations_done(14, 9, 1.5) == 1  # 13.5 steps


def test_tiny_intervals_in_exponent_notation() -> None:
    assert validations_done(3, 10**6, 1e-05) == 0
    assert validations_done(10, 10**6, 1e-05) == 1
