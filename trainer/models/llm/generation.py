"""Next-item-title generation with an LLM (LLM-SRec, KDD'25, Table 1 and Appendix A): the answer is the item's title.

Trained by next-token cross-entropy on the answer alone. Candidates are compared by the log-likelihood of their titles
per token; the prompt before the titles is computed once for all candidates.

Letters: B users, C candidates, A answer tokens of all users, R read-outs, D width of the LLM, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from trainer.data.collators.generation import Answers, TitleChoices, TitleQuestions, TitleTraining
from trainer.models.interface import Losses

if TYPE_CHECKING:  # evaluating any system imports this file, and transformers takes seconds to import
    from trainer.models.llm.prompt_reader import PromptReader
    from trainer.nn.llm.lm_head import LMHead

LOGITS_AT_ONCE = 1024
"""Tokens whose logits are computed at once: 0.5 GB at a vocabulary of 128,000."""


class AnswerTerms(NamedTuple):
    """Summed cross-entropy of each user's answer in nats, and its number of tokens."""

    loss_B: Tensor
    count_B: Tensor


class TitleScores(NamedTuple):
    """Mean log-likelihood per token of each candidate's title, and whether greedy decoding writes exactly it."""

    score_BC: Tensor
    greedy_BC: Tensor


class TitleGenerator(nn.Module):
    """Trains the trained parts of the reader; the LM head is the LLM's own, frozen."""

    def __init__(self, reader: PromptReader, head: LMHead) -> None:
        super().__init__()
        self.reader = reader
        self.head = head

    def forward(self, batch: TitleTraining) -> AnswerTerms:
        """Cross-entropy of each user's answer tokens, the end token included."""
        loss_A = -self._log_likelihood(self._read(batch), batch.answers)[0]
        users = len(batch.user_B)
        return AnswerTerms(_sums(loss_A, batch.answers, users), _sums(torch.ones_like(loss_A), batch.answers, users))

    def loss(self, terms: AnswerTerms) -> Losses:
        """Mean over all answer tokens of the global batch."""
        total = terms.loss_B.sum() / terms.count_B.sum().clamp(min=1)
        return Losses(total, {"language_model": total.detach()})

    def title_scores(self, batch: TitleChoices) -> Tensor:
        """(B, C) mean log-likelihood of the tokens of each candidate's title, in nats."""
        return self.compare(batch).score_BC

    def compare(self, batch: TitleChoices) -> TitleScores:
        """Scores, and which candidates greedy decoding would write: those whose every token is the most likely one.

        Candidates with equal tokens are all marked as written.
        """
        users, candidates = batch.shape
        likelihood_A, likeliest_A = self._log_likelihood(self._read(batch), batch.answers)
        sums = [
            _sums(value_A, batch.answers, users * candidates).view(users, candidates)
            for value_A in (likelihood_A, likeliest_A.float(), torch.ones_like(likelihood_A))
        ]
        return TitleScores(sums[0] / sums[2], sums[1] == sums[2])

    def next_tokens(self, batch: TitleQuestions) -> Tensor:
        """(B,) most likely next token of each prompt."""
        hidden_BD = self._read(batch)
        parts = [self.head(hidden_BD[first : first + LOGITS_AT_ONCE]).argmax(-1) for first in _starts(len(hidden_BD))]
        return torch.cat(parts)

    def _read(self, batch: TitleTraining | TitleChoices | TitleQuestions) -> Tensor:
        # Prompts of this task have no [UserOut] or [ItemOut].
        learned_KD = torch.zeros(0, self.reader.llm.dim, device=batch.prompts.slot_S.device)
        hidden_RD: Tensor = self.reader(batch.prompts, self.reader.user_vectors(batch.sequence), learned_KD)
        return hidden_RD

    def _log_likelihood(self, hidden_RD: Tensor, answers: Answers) -> tuple[Tensor, Tensor]:
        """(A,) log-likelihood of each answer token, and whether it is the most likely of the vocabulary."""
        likelihoods, likeliest = [], []
        for first in _starts(len(answers.token_A)):
            token_A = answers.token_A[first : first + LOGITS_AT_ONCE]
            logit_AV = self.head(hidden_RD[answers.readout_A[first : first + LOGITS_AT_ONCE]])
            likelihoods.append(logit_AV.log_softmax(-1).gather(1, token_A[:, None])[:, 0])
            likeliest.append(logit_AV.argmax(-1) == token_A)
        return torch.cat(likelihoods), torch.cat(likeliest)


def _starts(length: int) -> range:
    """Starts of chunks of `LOGITS_AT_ONCE` rows; no rows give one empty chunk, so that all ranks run the head."""
    return range(0, max(length, 1), LOGITS_AT_ONCE)


def _sums(value_A: Tensor, answers: Answers, count: int) -> Tensor:
    """(count,) sums of the values of each answer's tokens."""
    return torch.zeros(count, dtype=value_A.dtype, device=value_A.device).index_add(0, answers.answer_A, value_A)
