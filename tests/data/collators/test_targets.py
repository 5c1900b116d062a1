"""Targets: which items are predicted, and from which history."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
from data_helpers import of_items, to_lists

from trainer.data.collators.targets import TargetKind, Targets, choose_targets, expected_targets
from trainer.data.reading.histories import Histories

SEQUENCES = of_items([1, 2, 3, 4, 5, 6, 7, 8], [11, 12], [21, 22, 23], user_U=[5, 9, 70])


def pairs(targets: Targets, sequences: Histories = SEQUENCES) -> list[tuple[int, list[int], int]]:
    """(user, items shown, target) per target."""
    shown = targets.shown(sequences)
    bounds = zip(shown.offset_U1[:-1], shown.offset_U1[1:], strict=True)
    lists = [shown.item_E[a:b].tolist() for a, b in bounds]
    return list(zip(shown.user_U.tolist(), lists, targets.items(sequences).tolist(), strict=True))


def test_the_last_item_is_predicted_from_the_window_before_it() -> None:
    targets = choose_targets(SEQUENCES, "last", max_history=3, address=(0, 0))
    assert pairs(targets) == [(5, [5, 6, 7], 8), (9, [11], 12), (70, [21, 22], 23)]
    assert targets.before(SEQUENCES).length_U.tolist() == [7, 1, 2]
    for most in (1, 2, 100):
        assert to_lists(targets.before(SEQUENCES, most)) == to_lists(targets.before(SEQUENCES).last(most))
    assert targets.address_Y(SEQUENCES).tolist() == [5, 9, 70]
    assert targets.columns == 1


def test_every_item_but_the_first_is_predicted() -> None:
    targets = choose_targets(SEQUENCES, "all", max_history=3, address=(0, 0))
    of_first = [(5, list(range(max(1, n - 3), n)), n) for n in range(2, 9)]
    assert pairs(targets) == [*of_first, (9, [11], 12), (70, [21], 22), (70, [21, 22], 23)]
    assert targets.column_Y.tolist() == [*range(7), 0, 0, 1]
    assert targets.columns == 7
    assert len(set(targets.address_Y(SEQUENCES).tolist())) == len(targets)


def test_a_window_is_drawn_by_user_and_epoch_and_predicted_whole() -> None:
    starts = set()
    for epoch in range(40):
        found = pairs(choose_targets(SEQUENCES, "window", max_history=3, address=(0, epoch)))
        first = found[0][1][0]
        starts.add(first)
        assert found[:3] == [(5, list(range(first, n)), n) for n in range(first + 1, first + 4)]
        assert found[3:] == [(9, [11], 12), (70, [21], 22), (70, [21, 22], 23)]
    assert starts == {1, 2, 3, 4, 5}, "every window of four of eight items"


def test_shares_join_to_the_whole() -> None:
    whole = choose_targets(SEQUENCES, "window", max_history=3, address=(4, 2))
    parts = [(whole.take(share), SEQUENCES.take(share)) for share in (slice(0, 1), slice(1, 1), slice(1, 3))]
    assert [pair for part, own in parts for pair in pairs(part, own)] == pairs(whole)
    joined = np.concatenate([part.address_Y(own) for part, own in parts])
    assert joined.tolist() == whole.address_Y(SEQUENCES).tolist()
    assert {part.columns for part, _ in parts} == {whole.columns}


@pytest.mark.parametrize("kind", get_args(TargetKind))
def test_older_items_are_bare_vectors(kind: TargetKind) -> None:
    """What is shown with a title is as without them; the events right before that have none."""
    plain = choose_targets(SEQUENCES, kind, max_history=2, address=(0, 1))
    longer = choose_targets(SEQUENCES, kind, max_history=2, max_vector_items=3, address=(0, 1))
    assert longer.end_Y.tolist() == plain.end_Y.tolist()
    assert (longer.start_Y + longer.vectors_Y).tolist() == plain.start_Y.tolist()
    assert longer.vectors_Y.tolist() == np.minimum(plain.start_Y, 3).tolist()
    assert longer.vectors_Y.any()
    assert not plain.vectors_Y.any()


@pytest.mark.parametrize("kind", get_args(TargetKind))
def test_expected_targets_are_the_mean_over_epochs(kind: TargetKind) -> None:
    epochs = 4000 if kind == "window" else 1
    count_N = np.zeros(41)
    for epoch in range(epochs):
        chosen = choose_targets(SEQUENCES, kind, max_history=3, address=(0, epoch))
        np.add.at(count_N, chosen.items(SEQUENCES), 1 / epochs)
    expected_N = expected_targets(SEQUENCES, kind, max_history=3, num_items=40)
    np.testing.assert_allclose(expected_N, count_N, atol=0.03 if kind == "window" else 0)
