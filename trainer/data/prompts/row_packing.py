"""Packs whole prompts into padded rows, with few different row counts, for compilers that need static shapes.

Letters: B rows, T tokens of a row, P prompts without branches; see `packing.py` for all others.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from trainer.data.prompts.packing import _EMPTY, AttentionGroup, PackedPrompts, Stream, indices, joined
from trainer.data.prompts.prompt import READOUT_SLOT, USER_SLOT, Branch, Prompt
from trainer.data.reading.counter_rng import IntArray


def pack_rows(prompts: Sequence[Prompt], row_tokens: int) -> PackedPrompts:
    """Pack whole prompts into padded rows of `row_tokens`, for devices that compile a graph per shape (Gaudi).

    First-fit decreasing: the longest prompts first, each into the first row with room. No prefix is shared, and each
    branch becomes a prompt of its own. Batches differ by a few rows, so row counts are rounded up to few distinct ones.
    """
    unfolded = [(whole, index) for index, prompt in enumerate(prompts) for whole in unfold(prompt)]
    lengths = [len(prompt.token_T) for prompt, _ in unfolded]
    needed, row_P, column_P = _first_fit(lengths, row_tokens)
    rows = _round_up_rows(needed)
    token_BT = np.zeros((rows, row_tokens), np.int64)
    start_BT = np.tile(np.arange(row_tokens), (rows, 1))  # padding attends to itself: a softmax over no keys is NaN
    for (prompt, _), row, column in zip(unfolded, row_P, column_P, strict=True):
        columns = slice(column, column + len(prompt.token_T))
        token_BT[row, columns] = prompt.token_T
        start_BT[row, columns] = column
    column_BT = np.tile(np.arange(row_tokens), (rows, 1))
    index_BT = torch.arange(rows * row_tokens).view(rows, row_tokens)
    group = AttentionGroup(index_BT, index_BT, torch.from_numpy(start_BT), torch.from_numpy(column_BT))
    stream = Stream(
        torch.from_numpy(token_BT).flatten(),
        torch.from_numpy(column_BT - start_BT).flatten(),
        (group,),
        index_BT.flatten(),
        None,
    )
    at_P = row_P * row_tokens + column_P
    placed = [(prompt, index, at) for (prompt, index), at in zip(unfolded, at_P, strict=True)]
    item_S = np.concatenate([_EMPTY, *(prompt.item_S for prompt, _, _ in placed)])
    prompt_S = joined(np.full(len(prompt.item_S), index) for prompt, index, _ in placed)
    user_V = indices(item_S == USER_SLOT)
    return PackedPrompts(
        frozen=None,
        trained=stream,
        slot_S=joined(at + prompt.slot_S for prompt, _, at in placed),
        slot_item_S=torch.from_numpy(item_S),
        slot_prompt_S=prompt_S,
        learned_K=indices(item_S == READOUT_SLOT),
        shown_I=indices(item_S > 0),
        user_V=user_V,
        user_prompt_V=prompt_S[user_V],  # a user's slot is repeated in each of its branches
        readout_R=joined(at + prompt.readout_R for prompt, _, at in placed),
        readout_prompt_R=joined(np.full(len(prompt.readout_R), index) for prompt, index, _ in placed),
        cached_M=_EMPTY,
        useful_tokens=sum(prompt.tokens for prompt in prompts),
        run_tokens=rows * row_tokens,
    )


def unfold(prompt: Prompt) -> list[Prompt]:
    """Split a prompt into prompts without branches: the trunk, if it has read-outs, then the trunk with each branch.

    A prompt that ends in a branch keeps the read-outs of the branch only.
    """
    trunk = [Prompt(prompt.token_T, prompt.slot_S, prompt.item_S, prompt.readout_R)] if len(prompt.readout_R) else []
    return trunk + [_continued(prompt, branch) for branch in prompt.branches]


def _continued(prompt: Prompt, branch: Branch) -> Prompt:
    """The trunk up to the branch, and the branch, as one prompt."""
    seen = prompt.slot_S < branch.after
    return Prompt(
        np.concatenate([prompt.token_T[: branch.after], branch.token_T]),
        np.concatenate([prompt.slot_S[seen], branch.after + branch.slot_S]),
        np.concatenate([prompt.item_S[seen], branch.item_S]),
        branch.after + branch.readout_R,
    )


def _round_up_rows(count: int) -> int:
    """Round up to one of 1 to 8, 10, 12, 14, 16, 20, 24, 28, 32, ...: four counts up to each further power of two."""
    unit = 1 << max((count - 1).bit_length() - 3, 0)
    return -(-count // unit) * unit


def _first_fit(lengths: Sequence[int], row_tokens: int) -> tuple[int, IntArray, IntArray]:
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
    return max(len(free), 1), row_P, column_P  # an empty rank runs the decoder too, as all ranks do
