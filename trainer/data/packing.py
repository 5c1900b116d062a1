"""Many prompts in rows of one fixed length.

Position ids restart at each prompt, which is how the attention knows the prompts apart. Fixed rows mean one graph for
`torch.compile` and on Gaudi.

Letters: R rows, T tokens of a row, P prompts, S item slots of all prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trainer.data.prompts import Prompt


@dataclass(frozen=True)
class PackedPrompts:
    """Prompts in rows; prompt p's read-out stands at (`readout_row_P[p]`, `readout_column_P[p]`)."""

    token_RT: Tensor
    position_RT: Tensor
    slot_row_S: Tensor
    slot_column_S: Tensor
    slot_item_S: Tensor
    readout_row_P: Tensor
    readout_column_P: Tensor
    useful_tokens: int
    """Tokens of prompts; the rest of R x T is padding."""


def pack(prompts: Sequence[Prompt], row_tokens: int) -> PackedPrompts:
    """First-fit decreasing: the longest prompts first, each into the first row with room.

    No prompts give one row of padding, so that a rank without work still takes part in collective operations.
    """
    lengths = [len(prompt.token_T) for prompt in prompts]
    rows, row_P, column_P = _first_fit(lengths, row_tokens)
    token_RT = np.zeros((rows, row_tokens), np.int64)
    # What is left of a row is one more stretch, positions from 0, that nobody reads.
    position_RT = np.tile(np.arange(row_tokens), (rows, 1))
    used_R = np.zeros(rows, np.int64)
    for prompt, row, column in zip(prompts, row_P, column_P, strict=True):
        stretch = slice(column, column + len(prompt.token_T))
        token_RT[row, stretch] = prompt.token_T
        position_RT[row, stretch] = np.arange(len(prompt.token_T))
        used_R[row] = max(used_R[row], stretch.stop)
    for row, used in enumerate(used_R):
        position_RT[row, used:] = np.arange(row_tokens - used)
    slots = [len(prompt.slot_S) for prompt in prompts]
    empty = np.zeros(0, np.int64)
    slot_column = [prompt.slot_S + column for prompt, column in zip(prompts, column_P, strict=True)]
    return PackedPrompts(
        token_RT=torch.from_numpy(token_RT),
        position_RT=torch.from_numpy(position_RT),
        slot_row_S=torch.from_numpy(np.repeat(row_P, slots)),
        slot_column_S=torch.from_numpy(np.concatenate([empty, *slot_column])),
        slot_item_S=torch.from_numpy(np.concatenate([empty, *(prompt.item_S for prompt in prompts)])),
        readout_row_P=torch.from_numpy(row_P),
        readout_column_P=torch.from_numpy(column_P + np.array(lengths, np.int64) - 1),
        useful_tokens=sum(lengths),
    )


def _first_fit(lengths: Sequence[int], row_tokens: int) -> tuple[int, np.ndarray, np.ndarray]:
    """Number of rows, and each prompt's row and first column."""
    row_P = np.zeros(len(lengths), np.int64)
    column_P = np.zeros(len(lengths), np.int64)
    free: list[int] = []
    for prompt in np.argsort([-length for length in lengths], kind="stable"):
        length = lengths[prompt]
        assert length <= row_tokens, "PromptWriter keeps prompts within a row"
        row = next((row for row, room in enumerate(free) if room >= length), len(free))
        if row == len(free):
            free.append(row_tokens)
        row_P[prompt], column_P[prompt] = row, row_tokens - free[row]
        free[row] -= length
    return max(len(free), 1), row_P, column_P
