"""A loaded run that answers queries in batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from trainer.data.raw.history import History
from trainer.data.raw.items import RawItems
from trainer.data.reading.histories import Histories
from trainer.distributed import alone
from trainer.runs.preflight import SavedRun
from trainer.workflows.load_run import load_run
from trainer.workflows.recommending.asking import Asked, ask_histories, latest_time
from trainer.workflows.recommending.recommend import Recommendations, Recommender
from trainer.workflows.serving.query import Query


@dataclass(frozen=True)
class Question:
    """A query whose items were found in the catalog."""

    asked: Asked
    """One history."""
    k: int
    exclude_seen: bool


class Answerer:
    """A run with its model in memory. `read` may be called from any thread, `answer` from one at a time."""

    def __init__(self, saved: SavedRun, batch: int, threads: int | None = None) -> None:
        """Load the model and the item vectors.

        Args:
            batch: most questions per batch.
            threads: CPU threads; None: as the run was configured.

        Raises:
            ValueError: as `load_run`.
        """
        self.saved = saved
        items = RawItems.read(saved.config.data.path, saved.manifest.num_items)
        self.items = replace(items, source="the catalog")  # answers name no path of this machine
        self._time = latest_time(saved)
        run = load_run(saved, alone(saved.config.engine.threads if threads is None else threads), exact=False)
        device = run.evaluator.world.device
        self._recommender = Recommender(run.system.vectors, self.items, run.item_vectors, device, batch)
        # Once as a check and to warm up: the first pass of a model allocates, and prepares the catalog.
        self.answer([self.read(Query(history=[self.items.ids[0]]))])

    def read(self, query: Query) -> Question:
        """Find the items of a query.

        Raises:
            ValueError: it names items that the catalog does not have, or its times are not times.
        """
        history = History(query.history, query.times, query.user_id)
        asked = ask_histories(self.saved, self.items, [history], query.unknown)
        return Question(asked.at(self._time), query.k, query.exclude_seen)

    def answer(self, questions: Sequence[Question]) -> list[Recommendations]:
        """Recommend after all histories together, in their order."""
        answers: dict[int, Recommendations] = {}
        for exclude_seen in (True, False):
            rows = [row for row, question in enumerate(questions) if question.exclude_seen is exclude_seen]
            answers |= zip(rows, self._answers([questions[row] for row in rows], exclude_seen), strict=True)
        return [answers[row] for row in range(len(questions))]

    def _answers(self, questions: Sequence[Question], exclude_seen: bool) -> Iterator[Recommendations]:
        if not questions:
            return
        most = max(question.k for question in questions)
        found = self._recommender.recommend(_together(questions), most, exclude_seen=exclude_seen)
        for question, answer in zip(questions, found, strict=True):
            yield replace(answer, recommendations=answer.recommendations[: question.k])


def _together(questions: Sequence[Question]) -> Asked:
    """All histories as one; none has new titles, for queries cannot ask that titles be read."""
    parts = [question.asked for question in questions]
    return Asked(
        Histories.concatenate([part.histories for part in parts]),
        [user for part in parts for user in part.user_ids],
        [dated for part in parts for dated in part.dated_U],
    )
