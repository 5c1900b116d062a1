"""One set of negatives per user: distinct, none of the user's items, the same at any number of ranks."""

from __future__ import annotations

import pickle

import torch
from data_helpers import of_items, without_held_out

from trainer.data.collators.sequences import SequenceCollator
from trainer.data.collators.shared_negatives import SharedNegativeCollator

USERS = without_held_out(of_items([1, 2, 3, 4, 5], [6], [7, 8, 9], user_U=[3, 5, 9]))


def _collator(negatives: int) -> SharedNegativeCollator:
    return SharedNegativeCollator(SequenceCollator(12, 4, negatives=0, fixed_length=False, seed=1), negatives)


def test_negatives_are_distinct_items_that_the_user_does_not_have() -> None:
    batch = _collator(7).train(USERS, slice(0, 3), 0)
    for row, own in zip(batch.negative_BK.tolist(), [{1, 2, 3, 4, 5}, {6}, {7, 8, 9}], strict=True):
        assert len(set(row)) == 7
        assert set(row) <= set(range(1, 13)) - own


def test_a_share_has_the_negatives_of_the_whole_batch() -> None:
    collator = _collator(3)
    whole, part = collator.train(USERS, slice(0, 3), 2), collator.train(USERS, slice(1, 3), 2)
    assert torch.equal(part.negative_BK, whole.negative_BK[1:])
    assert torch.equal(part.target_BL, whole.target_BL[1:])
    assert not torch.equal(collator.train(USERS, slice(0, 3), 3).negative_BK, whole.negative_BK)


def test_losses_over_the_catalog_draw_nothing() -> None:
    """A user who owns the whole catalog, for whom no negative exists, is therefore accepted."""
    everything = without_held_out(of_items(range(1, 13)))
    batch = _collator(0).train(everything, slice(0, 1), 0)
    assert batch.negative_BK.shape == (1, 0)
    assert SequenceCollator(12, 4, 0, False, 1).train(everything, slice(0, 1), 0).negative_BLK.shape == (1, 4, 0)


def test_collator_can_be_sent_to_loader_processes() -> None:
    collator = pickle.loads(pickle.dumps(_collator(3)))
    assert collator == _collator(3)
    assert collator.max_history == 4
