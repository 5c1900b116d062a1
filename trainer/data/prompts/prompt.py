"""Prompts as data: token ids with slots for injected embeddings, and branches."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.data.reading.counter_rng import IntArray

USER_SLOT = 0
"""Value in `item_S`: the slot receives the vector of the prompt's user."""


READOUT_SLOT = -1
"""Value in `item_S`: the slot receives the learned token, [UserOut] or [ItemOut], whose hidden state is read out."""


@dataclass(frozen=True)
class Branch:
    """One of several continuations of a prompt, which do not attend to each other; positions count from its start."""

    after: int
    """Number of the trunk's tokens that the branch continues and attends to."""
    token_T: IntArray
    slot_S: IntArray
    item_S: IntArray
    readout_R: IntArray


@dataclass(frozen=True)
class Prompt:
    """Token ids with slots: positions `slot_S` receive injected embeddings, positions `readout_R` are read out.

    `item_S` says which embedding a slot receives: that of an item (its id, from 1), `USER_SLOT` or `READOUT_SLOT`.
    """

    token_T: IntArray
    slot_S: IntArray
    item_S: IntArray
    readout_R: IntArray
    branches: tuple[Branch, ...] = ()

    @property
    def tokens(self) -> int:
        """Number of tokens of the trunk and all branches."""
        return len(self.token_T) + sum(len(branch.token_T) for branch in self.branches)
