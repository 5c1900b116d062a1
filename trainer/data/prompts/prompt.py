"""Prompts as data: token ids with slots for vectors, and branches."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.data.reading.counter_rng import IntArray

USER_SLOT = 0
"""In `item_S`: the vector of the prompt's user."""


READOUT_SLOT = -1
"""In `item_S`: the learned token behind which a representation is read, [UserOut] or [ItemOut]."""


@dataclass(frozen=True)
class Branch:
    """One of several continuations of a prompt, which do not see each other. Positions count from its own start."""

    after: int
    """How many of the prompt's own tokens it sees."""
    token_T: IntArray
    slot_S: IntArray
    item_S: IntArray
    readout_R: IntArray


@dataclass(frozen=True)
class Prompt:
    """Token ids; the positions `slot_S` receive vectors, at the positions `readout_R` the hidden state is read.

    `item_S` says which vector: an item's (its id, from 1), `USER_SLOT` or `READOUT_SLOT`.
    """

    token_T: IntArray
    slot_S: IntArray
    item_S: IntArray
    readout_R: IntArray
    branches: tuple[Branch, ...] = ()

    @property
    def tokens(self) -> int:
        """Of the trunk and the branches."""
        return len(self.token_T) + sum(len(branch.token_T) for branch in self.branches)
