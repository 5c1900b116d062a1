"""A thread that owns the model: it answers whatever has come in since its last batch, together."""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

log = logging.getLogger(__name__)

QuestionT = TypeVar("QuestionT")
AnswerT = TypeVar("AnswerT")

_RECENT = 0.2
"""Weight of the newest batch in the mean time per question."""
_LONGEST = 60
"""Most seconds that a client is told to stay away."""


class Busy(Exception):  # noqa: N818 - a state of the server, not an error in it
    """The queue is full; `retry_after` are the seconds that emptying it takes."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the server is busy: try again in {retry_after} s")
        self.retry_after = retry_after


class Worker(Generic[QuestionT, AnswerT]):
    """Batches of questions in a thread of their own.

    Nothing waits for a batch to fill: while the model answers one, the next comes together. A single question is thus
    answered at once, and batches grow with the load.
    """

    def __init__(
        self,
        answer: Callable[[Sequence[QuestionT]], Sequence[AnswerT]],
        *,
        batch: int,
        waiting: int,
        observe: Callable[[int, float], None] = lambda size, seconds: None,
    ) -> None:
        """Start the thread.

        Args:
            answer: called in the thread alone; one answer per question.
            batch: most questions per call.
            waiting: most questions that wait; further ones are `Busy`.
            observe: receives the size and the seconds of each batch.
        """
        self._answer, self._batch, self._observe = answer, batch, observe
        self._queue: queue.Queue[tuple[QuestionT, Future[AnswerT]] | None] = queue.Queue(waiting)
        self._seconds = 0.0
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Questions that wait."""
        return self._queue.qsize()

    @property
    def alive(self) -> bool:
        """Whether questions are answered."""
        return self._thread.is_alive()

    def ask(self, question: QuestionT) -> Future[AnswerT]:
        """Queue a question; a future that is cancelled before its batch begins costs nothing.

        Raises:
            Busy: too many questions wait.
        """
        future: Future[AnswerT] = Future()
        try:
            self._queue.put_nowait((question, future))
        except queue.Full:
            raise Busy(min(max(math.ceil(self.waiting * self._seconds), 1), _LONGEST)) from None
        return future

    def close(self) -> None:
        """Answer what waits, and end the thread."""
        self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        ending = False
        while not ending:
            taken, ending = self._take()
            asked = [(question, future) for question, future in taken if future.set_running_or_notify_cancel()]
            if asked:
                self._answer_all(asked)

    def _take(self) -> tuple[list[tuple[QuestionT, Future[AnswerT]]], bool]:
        """What waits, up to a batch, and whether it was the last."""
        taken = []
        entry = self._queue.get()
        while entry is not None:
            taken.append(entry)
            if len(taken) == self._batch:
                break
            try:
                entry = self._queue.get_nowait()
            except queue.Empty:
                break
        return taken, entry is None

    def _answer_all(self, asked: Sequence[tuple[QuestionT, Future[AnswerT]]]) -> None:
        started = time.perf_counter()
        try:
            answers = self._answer([question for question, _ in asked])
            assert len(answers) == len(asked), "one answer per question"
        except Exception as error:  # a bug must fail these requests, not the server
            log.exception("a batch of %d failed", len(asked))
            for _, future in asked:
                future.set_exception(error)
            return
        for (_, future), answer in zip(asked, answers, strict=True):
            future.set_result(answer)
        seconds = time.perf_counter() - started
        self._seconds += _RECENT * (seconds / len(asked) - self._seconds)
        self._observe(len(asked), seconds)
