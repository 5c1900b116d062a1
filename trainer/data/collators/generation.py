"""Batches for next-item-title generation (Table 1 of the LLM-SRec paper): choose a title from candidates.

Letters: B users, C candidates, A answer tokens of all users, P prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from trainer.data.collators.base import ON_HOST, ItemSequences
from trainer.data.collators.negatives import OFFICIAL_HISTORY, draw_negatives
from trainer.data.collators.retrieval import events_of, teacher_sequences, vectors_of
from trainer.data.collators.sequences import SequenceCollator
from trainer.data.collators.targets import choose_targets
from trainer.data.prompts.packing import PackedPrompts
from trainer.data.prompts.prompt import Branch, Prompt
from trainer.data.prompts.writer import PromptWriter
from trainer.data.reading.counter_rng import IntArray, hash64
from trainer.data.reading.histories import Histories, Users

_EMPTY = np.zeros(0, np.int64)


@dataclass(frozen=True)
class Answers:
    """Tokens of answers, each with the read-out that predicts it."""

    token_A: Tensor
    readout_A: Tensor
    """Index of that read-out among all read-outs of the prompts."""
    answer_A: Tensor
    """Index of the answer that the token belongs to: b in training, b * C + c when candidates are compared."""


@dataclass(frozen=True)
class TitleTraining:
    """One prompt per user that ends in its answer, the title of the target."""

    user_B: Tensor = field(metadata=ON_HOST)
    prompts: PackedPrompts
    sequence: ItemSequences | None
    answers: Answers


@dataclass(frozen=True)
class TitleQuestions:
    """One prompt per user, read out where the next token is predicted."""

    prompts: PackedPrompts
    sequence: ItemSequences | None


@dataclass(frozen=True)
class TitleChoices:
    """One prompt per user that branches into the titles of all its candidates, in the order given."""

    prompts: PackedPrompts
    sequence: ItemSequences | None
    answers: Answers
    shape: tuple[int, int]
    """(B, C)."""

    @property
    def useful_tokens(self) -> int:
        """See `HistoryBatch.useful_tokens`."""
        return self.prompts.useful_tokens


@dataclass(frozen=True)
class TitleCollator:
    """Builds prompts whose target is the last training item; the order of the candidates is random per user."""

    writer: PromptWriter
    teacher: SequenceCollator | None
    num_items: int
    shown_history: int
    """Items per history in a prompt; the latest ones have titles, the `max_vector_items` before them do not."""
    negatives: int
    exclude_user: bool
    """True: negatives avoid all training items of the user. False: only those before the target."""
    pack: Callable[[Sequence[Prompt]], PackedPrompts]
    seed: int
    max_vector_items: int = 0

    @property
    def max_history(self) -> int:
        """See `Collator.max_history`; if prompts inject the teacher's user vector, also what the teacher reads."""
        read = self.teacher.max_history if self.teacher and self.writer.injects_user else 0
        return max(self.shown_history, read)

    def train(self, users: Users, share: slice, epoch: int) -> TitleTraining:
        """Build the batch of rows `share` of the global batch `users`."""
        address = (self.seed, epoch)
        every = choose_targets(users.train, "last", max_history=self.shown_history, address=address)
        mine = users.take(share).train
        history, target_B = mine.without_last(), mine.last_item_U()
        forbidden = mine if self.exclude_user else history.last(max(OFFICIAL_HISTORY, self.shown_history))
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
            # Prompts are read out at their answers' tokens only, so read-outs and answer tokens have the same order.
            answers=_answers(answers, [range(sum(map(len, answers)))]),
        )

    def choices(self, histories: Histories, item_BC: IntArray) -> TitleChoices:
        """Build the batch that compares each user's candidates `item_BC`; no history may hold its own candidates."""
        prompts: list[Prompt] = []
        answers: list[list[int]] = []
        readouts: list[list[int]] = []
        next_readout = 0
        for question, item_C in zip(self._questions(histories, item_BC, (self.seed,)), item_BC, strict=True):
            titles = [self.writer.answer(int(item)) for item in item_C]
            # The question's read-out predicts the first token of every title.
            question_readout, next_readout = next_readout, next_readout + 1
            for title in titles:
                readouts.append([question_readout, *range(next_readout, next_readout + len(title) - 1)])
                next_readout += len(title) - 1
            prompts.append(replace(question, branches=tuple(_branch(question, title) for title in titles)))
            answers += titles
        return TitleChoices(self.pack(prompts), self._sequences(histories), _answers(answers, readouts), item_BC.shape)

    def questions(self, histories: Histories, item_BC: IntArray, said: Sequence[Sequence[int]]) -> TitleQuestions:
        """Build the batch that predicts the next token of each answer; `said[b]` is user b's answer so far."""
        questions = self._questions(histories, item_BC, (self.seed,))
        prompts = [_with_partial_answer(question, answer) for question, answer in zip(questions, said, strict=True)]
        return TitleQuestions(self.pack(prompts), self._sequences(histories))

    def _questions(self, histories: Histories, item_BC: IntArray, address: tuple[int, ...]) -> list[Prompt]:
        # Callers put the target first: shuffle, so that its position does not give it away.
        order_BC = np.argsort(hash64(*address, histories.user_U[:, None], item_BC), axis=1, kind="stable")
        shown_BC = np.take_along_axis(item_BC, order_BC, axis=1)
        shown = histories.last(self.shown_history)
        vectors = vectors_of(shown, self.shown_history - self.max_vector_items).tolist()
        rows = zip(events_of(shown), shown_BC, vectors, strict=True)
        return [self.writer.choice_prompt(*events, item_C, count) for events, item_C, count in rows]

    def _sequences(self, histories: Histories) -> ItemSequences | None:
        return self.teacher.histories(histories) if self.teacher else None


def _answered(question: Prompt, answer: list[int]) -> Prompt:
    """The question and its answer, read out wherever a token of the answer is predicted.

    The answer's last token is not run, because nothing follows it.
    """
    asked = len(question.token_T)
    return replace(
        question,
        token_T=np.concatenate([question.token_T, answer[:-1]]).astype(np.int64),
        readout_R=np.arange(asked - 1, asked + len(answer) - 1),
    )


def _with_partial_answer(question: Prompt, said: Sequence[int]) -> Prompt:
    """The question and the answer so far, read out at the last token."""
    token_T = np.concatenate([question.token_T, said]).astype(np.int64)
    return replace(question, token_T=token_T, readout_R=np.array([len(token_T) - 1]))


def _branch(question: Prompt, answer: list[int]) -> Branch:
    """All tokens of an answer but the last, which predicts nothing; each is read out."""
    token_T = np.array(answer[:-1], np.int64)
    return Branch(len(question.token_T), token_T, _EMPTY, _EMPTY, np.arange(len(token_T)))


def _answers(answers: Sequence[Sequence[int]], readouts: Sequence[Sequence[int]]) -> Answers:
    def joined(parts: Sequence[Sequence[int]]) -> Tensor:
        return torch.from_numpy(np.concatenate([_EMPTY, *(np.asarray(part, np.int64) for part in parts)]))

    answer_A = np.repeat(np.arange(len(answers)), [len(answer) for answer in answers])
    return Answers(joined(answers), joined(readouts), torch.from_numpy(answer_A))
