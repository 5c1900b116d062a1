"""Scoring of generated titles: candidates that share a title, and greedily decoded answers.

An answer is right if it is the target's title, whichever item it was meant for, and valid if it is the title of a
candidate. Titles are compared without regard to case, surrounding quotes and repeated spaces.

Letters: B users, C candidates, O users whose answer is still open.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from trainer.data.collators.base import to_device
from trainer.data.collators.generation import TitleCollator
from trainer.data.raw.items import normalized
from trainer.data.reading.counter_rng import IntArray
from trainer.data.reading.histories import Histories
from trainer.models.llm.generation import TitleGenerator


def merge_same_titles(score_BC: Tensor, item_BC: IntArray, title_of: Sequence[str]) -> Tensor:
    """(B, C) scores in which candidates with the title of the target (column 0) count as the target.

    The target gets the best score among them; the duplicates get minus infinity.

    Args:
        title_of: normalized titles, by item id.
    """
    same_BC = torch.tensor(
        [[title_of[item] == title_of[row[0]] for item in row] for row in item_BC.tolist()], dtype=torch.bool
    ).view(score_BC.shape)
    same_BC = same_BC.to(score_BC.device)
    lowest = float("-inf")
    merged_BC = score_BC.masked_fill(same_BC, lowest)
    merged_BC[:, 0] = score_BC.masked_fill(~same_BC, lowest).amax(1)
    return merged_BC


def judge_greedy(
    model: TitleGenerator,
    collator: TitleCollator,
    histories: Histories,
    item_BC: IntArray,
    greedy_BC: Tensor,
    device: torch.device,
) -> tuple[IntArray, IntArray]:
    """Whether each user's greedy answer is right, and whether it is valid; each (B,) of 0 or 1.

    For most users the candidates' scores already show the greedy answer: a title whose every token is the likeliest is
    what greedy decoding writes. Only the other users are decoded, token by token.

    Args:
        greedy_BC: whether greedy decoding writes exactly this candidate's title; see `TitleScores`.
    """
    writer = collator.writer
    exact_BC = greedy_BC.cpu().numpy()
    # Back from tokens, as decoded answers are, and without the end token.
    title_BC = [[normalized(writer.text(writer.answer(item)[:-1])) for item in item_C] for item_C in item_BC.tolist()]
    answer_B = [title_C[int(exact_C.argmax())] for title_C, exact_C in zip(title_BC, exact_BC, strict=True)]
    open_O = np.flatnonzero(~exact_BC.any(1))
    titles = [title_BC[row] for row in open_O]
    written = _decode(model, collator, histories.take(open_O), item_BC[open_O], titles, device)
    for row, answer in zip(open_O.tolist(), written, strict=True):
        answer_B[row] = answer
    right_B = [answer == title_C[0] for answer, title_C in zip(answer_B, title_BC, strict=True)]
    valid_B = [answer in title_C for answer, title_C in zip(answer_B, title_BC, strict=True)]
    return np.array(right_B, np.int64), np.array(valid_B, np.int64)


def _decode(
    model: TitleGenerator,
    collator: TitleCollator,
    histories: Histories,
    item_BC: IntArray,
    title_BC: Sequence[Sequence[str]],
    device: torch.device,
) -> list[str]:
    """Each user's greedy answer, normalized; decoding ends early once it cannot become any candidate's title.

    Every rank runs the same number of passes, on empty batches once its users are done: under ZeRO-3 a forward pass is
    collective.
    """
    writer = collator.writer
    decoded: list[list[int]] = [[] for _ in item_BC]
    answer = [""] * len(item_BC)
    open_O = list(range(len(item_BC)))
    for _ in range(writer.longest_answer):
        rows = np.array(open_O, np.int64)
        part = collator.questions(histories.take(rows), item_BC[rows], [decoded[row] for row in open_O])
        still_open = []
        for row, token in zip(open_O, model.next_tokens(to_device(part, device)).tolist(), strict=True):
            if token == writer.end_token:
                continue
            decoded[row].append(token)
            # The last character may still lack bytes, which decodes as U+FFFD.
            answer[row] = normalized(writer.text(decoded[row]).rstrip("\ufffd"))
            if any(title.startswith(answer[row]) for title in title_BC[row]):
                still_open.append(row)
        open_O = still_open
    return answer
