"""Batches for next-item-title generation (Table 1 of the LLM-SRec paper): choose a title among candidates.

Letters: B users, C candidates, A answer tokens of all users, P prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from trainer.data.collators.base import ItemSequences
from trainer.data.collators.negatives import draw_negatives
from trainer.data.collators.retrieval import shown_events, teacher_sequences
from trainer.data.collators.sequences import SequenceCollator
from trainer.data.collators.targets import choose_targets
from trainer.data.prompts.packing import PackedPrompts
from trainer.data.prompts.prompt import Branch, Prompt
from trainer.data.prompts.writer import PromptWriter
from trainer.data.reading.counter_rng import IntArray, hash64
from trainer.data.reading.histories import Histories, Users

_NOTHING = np.zeros(0, np.int64)


@dataclass(frozen=True)
class Answers:
    """Tokens that answers are made of, each with the read-out that predicts it."""

    token_A: Tensor
    readout_A: Tensor
    """Places among the prompts' read-outs."""
    answer_A: Tensor
    """Which answer the token belongs to: user b's in training, b * C + c when candidates are compared."""


@dataclass(frozen=True)
class TitleTraining:
    """One prompt a user that ends in its answer, the title of the target."""

    user_B: Tensor
    prompts: PackedPrompts
    sequence: ItemSequences | None
    answers: Answers


@dataclass(frozen=True)
class TitleQuestions:
    """One prompt a user, read where the next token is predicted."""

    prompts: PackedPrompts
    sequence: ItemSequences | None


@dataclass(frozen=True)
class TitleChoices:
    """One prompt a user that branches into the titles of all its candidates, in the order they were given."""

    prompts: PackedPrompts
    sequence: ItemSequences | None
    answers: Answers
    shape: tuple[int, int]
    """(B, C)."""

    @property
    def useful_tokens(self) -> int:
        """LLM tokens of the prompts, had each been run alone."""
        return self.prompts.useful_tokens


@dataclass(frozen=True)
class TitleCollator:
    """The last training item is the target; candidates are listed in an order drawn for each user."""

    writer: PromptWriter
    teacher: SequenceCollator | None
    num_items: int
    max_history: int
    negatives: int
    exclude_user: bool
    """Negatives avoid all training items of the user; False: only the shown history."""
    pack: Callable[[Sequence[Prompt]], PackedPrompts]
    seed: int

    def train(self, users: Users, share: slice, epoch: int) -> TitleTraining:
        """The rows `share` of the global batch `users`."""
        address = (self.seed, epoch)
        every = choose_targets(users.train, "last", max_history=self.max_history, address=address)
        mine = users.take(share).train
        history, target_B = mine.without_last(), mine.last_item_U()
        forbidden = mine if self.exclude_user else history.last(self.max_history)
        negative_BK = draw_negatives(
            forbidden, self.negatives, num_items=self.num_items, distinct=True, address=address
        )
        item_BC = np.concatenate([target_B[:, None], negative_BK], axis=1)
        answers = [self.writer.answer(int(item)) for item in target_B]
        prompts = [
            _answered(question, answer)
            for question, answer in zip(self._questions(history, item_BC, address), answers, strict=True)
        ]
        return TitleTraining(
            user_B=torch.from_numpy(mine.user_U),
            prompts=self.pack(prompts),
            sequence=teacher_sequences(self.teacher, mine, every, share),
            answers=_answers(answers, [range(sum(map(len, answers)))]),
        )

    def choices(self, histories: Histories, item_BC: IntArray) -> TitleChoices:
        """What compares each user's candidates `item_BC`; the history may hold anything but them."""
        prompts: list[Prompt] = []
        answers: list[list[int]] = []
        readouts: list[list[int]] = []
        read = 0
        for question, item_C in zip(self._questions(histories, item_BC, (self.seed,)), item_BC, strict=True):
            titles = [self.writer.answer(int(item)) for item in item_C]
            question_end, read = read, read + 1  # predicts the first token of every title
            for title in titles:
                readouts.append([question_end, *range(read, read + len(title) - 1)])
                read += len(title) - 1
            prompts.append(replace(question, branches=tuple(_branch(question, title) for title in titles)))
            answers += titles
        return TitleChoices(self.pack(prompts), self._sequences(histories), _answers(answers, readouts), item_BC.shape)

    def questions(self, histories: Histories, item_BC: IntArray, said: Sequence[Sequence[int]]) -> TitleQuestions:
        """What asks for the token after those that each answer has so far."""
        questions = self._questions(histories, item_BC, (self.seed,))
        prompts = [_asked_again(question, answer) for question, answer in zip(questions, said, strict=True)]
        return TitleQuestions(self.pack(prompts), self._sequences(histories))

    def _questions(self, histories: Histories, item_BC: IntArray, address: tuple[int, ...]) -> list[Prompt]:
        order_BC = np.argsort(hash64(*address, histories.user_U[:, None], item_BC), axis=1, kind="stable")
        shown_BC = np.take_along_axis(item_BC, order_BC, axis=1)
        events = shown_events(histories, self.max_history)
        return [self.writer.choice_prompt(*shown, item_C) for shown, item_C in zip(events, shown_BC, strict=True)]

    def _sequences(self, histories: Histories) -> ItemSequences | None:
        return self.teacher.histories(histories) if self.teacher else None


def _answered(question: Prompt, answer: list[int]) -> Prompt:
    """The question and its answer, read wherever a token of the answer is predicted."""
    asked = len(question.token_T)
    return replace(
        question,
        token_T=np.concatenate([question.token_T, answer[:-1]]).astype(np.int64),
        readout_R=np.arange(asked - 1, asked + len(answer) - 1),
    )


def _asked_again(question: Prompt, said: Sequence[int]) -> Prompt:
    token_T = np.concatenate([question.token_T, said]).astype(np.int64)
    return replace(question, token_T=token_T, readout_R=np.array([len(token_T) - 1]))


def _branch(question: Prompt, answer: list[int]) -> Branch:
    """Everything of an answer but its last token, which nothing follows."""
    token_T = np.array(answer[:-1], np.int64)
    return Branch(len(question.token_T), token_T, _NOTHING, _NOTHING, np.arange(len(token_T)))


def _answers(answers: Sequence[Sequence[int]], readouts: Sequence[Sequence[int]]) -> Answers:
    def joined(parts: Sequence[Sequence[int]]) -> Tensor:
        return torch.from_numpy(np.concatenate([_NOTHING, *(np.asarray(part, np.int64) for part in parts)]))

    answer_A = np.repeat(np.arange(len(answers)), [len(answer) for answer in answers])
    return Answers(joined(answers), joined(readouts), torch.from_numpy(answer_A))
