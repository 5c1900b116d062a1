"""Masked sequences: how many masks, at which positions, decided by seed, epoch and user alone."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from data_helpers import chi_square, of_items, without_held_out

from trainer.data.collators.masking import MaskingCollator
from trainer.data.reading.histories import Users

ITEMS, MASK = 40, 41


def _collator(**changes: Any) -> MaskingCollator:
    settings = {"num_items": ITEMS, "max_length": 12, "mask_share": 0.3, "last_item_share": 0.0, "seed": 5}
    return MaskingCollator(**{**settings, **changes})


def _users(lengths: list[int], user_U: list[int] | None = None) -> Users:
    lists = [[1 + (7 * user + place) % ITEMS for place in range(length)] for user, length in enumerate(lengths)]
    return without_held_out(of_items(*lists, user_U=user_U))


def test_masked_items_are_the_targets_and_the_rest_is_seen() -> None:
    users = _users([10, 3, 20])
    batch = _collator().train(users, slice(0, 3), 0)
    whole = torch.from_numpy(users.train.padded(12))
    masked = batch.input.item_BL == MASK
    assert torch.equal(batch.target_BL, torch.where(masked, whole, 0))
    assert torch.equal(torch.where(masked, batch.target_BL, batch.input.item_BL), whole)
    # 0.3 of 10, of 3 and of the last 12 items, rounded
    assert masked.sum(1).tolist() == [3, 1, 4]


def test_at_least_one_item_is_masked() -> None:
    batch = _collator(mask_share=0.01).train(_users([1, 2, 12]), slice(0, 3), 0)
    assert (batch.target_BL > 0).sum(1).tolist() == [1, 1, 1]


def test_every_position_is_masked_equally_often() -> None:
    users = _users([10] * 2000)
    share_L = (_collator().train(users, slice(0, 2000), 0).target_BL > 0).float().mean(0)
    np.testing.assert_allclose(share_L, 0.3, atol=5 * (0.3 * 0.7 / 2000) ** 0.5)


def test_some_sequences_are_cut_after_a_random_item_which_alone_is_masked() -> None:
    users = _users([10] * 2000)
    batch = _collator(last_item_share=0.25).train(users, slice(0, 2000), 0)
    masked = batch.target_BL > 0
    alone = masked.sum(1) == 1  # all others have three
    assert alone.float().mean().item() == pytest.approx(0.25, abs=5 * (0.25 * 0.75 / 2000) ** 0.5)
    assert masked[alone, -1].all()
    # The items before the mask are the user's first one to nine items, each count equally often.
    whole = torch.from_numpy(users.train.padded(10))
    shown = batch.input.item_BL[:, -10:]
    lengths = (shown > 0).sum(1)
    for row in alone.nonzero().flatten().tolist()[:50]:
        length = int(lengths[row])
        assert shown[row, -length:-1].tolist() == whole[row, : length - 1].tolist()
        assert batch.target_BL[row, -1] == whole[row, length - 1]
    counts = torch.bincount(lengths[alone], minlength=11)
    assert counts[:2].tolist() == [0, 0]
    assert chi_square(counts[2:].numpy()) < 5
    assert (lengths[~alone] == 10).all()


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (1.0, 50)])
def test_none_or_all_sequences_end_in_the_mask(share: float, expected: int) -> None:
    masked = _collator(last_item_share=share).train(_users([10] * 50), slice(0, 50), 0).target_BL > 0
    assert int((masked.sum(1) == 1).sum()) == expected


def test_one_item_cannot_be_cut() -> None:
    batch = _collator(last_item_share=1.0).train(_users([1, 2]), slice(0, 2), 0)
    assert (batch.target_BL > 0).tolist() == [[False, True], [False, True]]


def test_masks_depend_on_user_epoch_and_seed_alone() -> None:
    users = _users([10, 6, 8, 12, 3], user_U=[4, 8, 15, 16, 23])
    collator = _collator(last_item_share=0.5)
    whole = collator.train(users, slice(0, 5), 3)
    for start, stop in [(0, 2), (2, 5)]:
        part = collator.train(users, slice(start, stop), 3)
        assert torch.equal(part.input.item_BL, whole.input.item_BL[start:stop])
        assert torch.equal(part.target_BL, whole.target_BL[start:stop])
        assert (part.input.rows.start, part.input.rows.total) == (start, 5)
    # Beside other users, a user is padded to a different length but masked at the same positions.
    for user in range(5):
        alone = collator.train(users.take(np.array([user])), slice(0, 1), 3).input.item_BL[0]
        assert torch.equal(alone, whole.input.item_BL[user, -len(alone) :])


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_masks_and_cuts_change_with_epoch_and_seed(share: float) -> None:
    users = _users([10] * 20)
    first, later, other = (
        _collator(last_item_share=share, seed=seed).train(users, slice(0, 20), epoch).target_BL
        for seed, epoch in [(5, 0), (5, 1), (6, 0)]
    )
    assert not torch.equal(first, later)
    assert not torch.equal(first, other)


def test_when_ranking_a_mask_follows_the_latest_item() -> None:
    collator = _collator()
    assert collator.max_history == 11
    item_BL = collator.histories(of_items([3, 4], range(1, 21))).item_BL
    assert item_BL.shape == (2, 12)
    assert item_BL[0].tolist() == [0] * 9 + [3, 4, MASK]
    assert item_BL[1].tolist() == [*range(10, 21), MASK]
    assert collator.histories(of_items()).item_BL.shape[0] == 0


def test_collator_can_be_sent_to_loader_processes() -> None:
    assert pickle.loads(pickle.dumps(_collator())) == _collator()
