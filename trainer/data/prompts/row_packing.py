"""Whole prompts in padded rows, in a few numbers of rows: for compilers that need known shapes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from trainer.data.prompts.packing import _NOTHING, AttentionGroup, PackedPrompts, Stream, joined, places
from trainer.data.prompts.prompt import READOUT_SLOT, USER_SLOT, Branch, Prompt
from trainer.data.reading.counter_rng import IntArray


def pack_rows(prompts: Sequence[Prompt], row_tokens: int) -> PackedPrompts:
    """Whole prompts in padded rows of one length, for devices that compile a graph for each shape (Gaudi).

    First-fit decreasing: the longest prompts first, each into the first row with room. Nothing is shared, and branches
    become prompts of their own. Batches differ by a few rows, so their number is rounded up to one of few.
    """
    alone = [(whole, number) for number, prompt in enumerate(prompts) for whole in unfold(prompt)]
    lengths = [len(prompt.token_T) for prompt, _ in alone]
    needed, row_P, column_P = _first_fit(lengths, row_tokens)
    rows = _one_of_few(needed)
    token_BT = np.zeros((rows, row_tokens), np.int64)
    start_BT = np.tile(np.arange(row_tokens), (rows, 1))  # padding sees itself
    for (prompt, _), row, column in zip(alone, row_P, column_P, strict=True):
        stretch = slice(column, column + len(prompt.token_T))
        token_BT[row, stretch] = prompt.token_T
        start_BT[row, stretch] = column
    column_BT = np.tile(np.arange(row_tokens), (rows, 1))
    place_BT = torch.arange(rows * row_tokens).view(rows, row_tokens)
    group = AttentionGroup(place_BT, place_BT, torch.from_numpy(start_BT), torch.from_numpy(column_BT))
    stream = Stream(
        torch.from_numpy(token_BT).flatten(),
        torch.from_numpy(column_BT - start_BT).flatten(),
        (group,),
        place_BT.flatten(),
        None,
    )
    at_P = row_P * row_tokens + column_P
    placed = [(prompt, number, at) for (prompt, number), at in zip(alone, at_P, strict=True)]
    item_S = np.concatenate([_NOTHING, *(prompt.item_S for prompt, _, _ in placed)])
    return PackedPrompts(
        frozen=None,
        trained=stream,
        slot_S=joined(at + prompt.slot_S for prompt, _, at in placed),
        slot_item_S=torch.from_numpy(item_S),
        slot_prompt_S=joined(np.full(len(prompt.item_S), number) for prompt, number, _ in placed),
        learned_K=places(item_S == READOUT_SLOT),
        shown_I=places(item_S > 0),
        user_V=places(item_S == USER_SLOT),
        readout_R=joined(at + prompt.readout_R for prompt, _, at in placed),
        readout_prompt_R=joined(np.full(len(prompt.readout_R), number) for prompt, number, _ in placed),
        cached_M=_NOTHING,
        useful_tokens=sum(prompt.tokens for prompt in prompts),
        run_tokens=rows * row_tokens,
    )


def unfold(prompt: Prompt) -> list[Prompt]:
    """The trunk where it is read, and trunk plus branch for each branch, without what was read before."""
    alone = [Prompt(prompt.token_T, prompt.slot_S, prompt.item_S, prompt.readout_R)] if len(prompt.readout_R) else []
    return alone + [_continued(prompt, branch) for branch in prompt.branches]


def _continued(prompt: Prompt, branch: Branch) -> Prompt:
    seen = prompt.slot_S < branch.after
    return Prompt(
        np.concatenate([prompt.token_T[: branch.after], branch.token_T]),
        np.concatenate([prompt.slot_S[seen], branch.after + branch.slot_S]),
        np.concatenate([prompt.item_S[seen], branch.item_S]),
        branch.after + branch.readout_R,
    )


def _one_of_few(count: int) -> int:
    """The next number of which there are four up to each power of two: 1 to 8, 10, 12, 14, 16, 20, 24, 28, 32, ..."""
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
    return max(len(free), 1), row_P, column_P
