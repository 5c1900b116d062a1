"""TensorBoard and other trackers beside a run's curves: sample answers at each validation, the test, its item vectors.

Letters: N items of the catalog.
"""

from __future__ import annotations

import logging
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from trainer.config import HistoryOrder
from trainer.data.reading.counter_rng import permutation
from trainer.data.reading.dataset import Dataset
from trainer.data.reading.shards import read_in_order
from trainer.engine.recording.board import add_items, add_test
from trainer.engine.recording.trackers import Trackers
from trainer.evaluation.protocol import Evaluator, Ranking
from trainer.evaluation.rankers import VectorRanker
from trainer.reports.results import RESULTS_FILE, latest, read
from trainer.reports.tables import METRICS
from trainer.runs.folder import Progress, RunFolder
from trainer.workflows.answers import Ranked, answer, questions

USERS = 3
"""Users whose answers are shown at each validation."""
_TOP = 5
_HISTORY = 6
_ORDERS: tuple[HistoryOrder, HistoryOrder] = ("original", "shuffled")
_ADDRESS = 9
"""Address of the sample's random numbers, as in `reports.page.cases`."""

log = logging.getLogger("trainer.board")


@dataclass
class Validation:
    """Validates a system, and then shows what it would recommend to a few users."""

    evaluator: Evaluator
    _last: Ranking | None = field(default=None, init=False)

    def metrics(self) -> dict[str, float]:
        """Each metric's mean; see `Evaluator.validate`."""
        self._last = self.evaluator.validation()
        return self._last.evaluate("valid").means(self.evaluator.config)

    def samples(self) -> str:
        """Answers in markdown, with the weights of `metrics`, called just before; "" for systems that score titles.

        Every rank of the run calls it, because a forward pass is collective under ZeRO-3.
        """
        if self._last is None or not isinstance(self._last.ranker, VectorRanker):
            return ""
        ranker, evaluator = self._last.ranker, self.evaluator
        self._last = None  # its item vectors are not kept on the device while training continues
        dataset, seed = evaluator.dataset, evaluator.config.seed
        manifest = dataset.manifest
        sampled_U = permutation(manifest.num_users, seed, _ADDRESS)[: manifest.sample_size(USERS, "valid")]
        asked = questions(dataset, "valid", "full", np.sort(sampled_U)).first(USERS)
        if not len(asked.histories):
            return ""
        original, shuffled = (
            answer(ranker.scoring, ranker.item_ND, asked, ranker.device, top=_TOP, history=history, seed=seed)
            for history in _ORDERS
        )
        parts = []
        for row, user in enumerate(asked.histories.user_U):
            read_items = asked.histories.take(np.array([row])).last(_HISTORY).item_E
            latest_titles = " · ".join(_escaped(dataset.titles[item - 1]) for item in read_items)
            target = int(asked.target_B[row])
            head = f"**user {user}**: {latest_titles} → **{_escaped(dataset.titles[target - 1])}**"
            parts.append(f"{head}\n\n{_table(dataset, target, original[row], shuffled[row])}")
        return "\n\n".join(parts)


def show_test(evaluator: Evaluator, ranking: Ranking, run: RunFolder, progress: Progress) -> None:
    """Write the test's results, original beside shuffled, and the item vectors; a full disk costs only these."""
    config = run.config()
    file = run.path / RESULTS_FILE
    wanted = ("test", evaluator.task, evaluator.config.candidates, progress.step)
    found = [r for r in latest(read(file)) if (r.split, r.task, r.candidates, r.step) == wanted]
    names = METRICS[evaluator.task][:2]
    metrics: dict[str, dict[str, float]] = {
        r.history: {name: r.metrics[name].value for name in names if name in r.metrics} for r in found
    }
    others = Trackers(
        run.path, config, [name for name in config.train.trackers if name != "tensorboard"], done_steps=progress.step
    )
    others.tested(progress.step, metrics)
    others.close()
    if "tensorboard" not in config.train.trackers:
        return
    try:
        with closing(SummaryWriter(str(run.path))) as board:
            add_test(board, metrics, progress.step)
            if isinstance(ranking.ranker, VectorRanker):
                dataset = evaluator.dataset
                add_items(board, ranking.ranker.item_ND, dataset.titles, _training_events(dataset), progress.step)
    except OSError as error:
        log.warning("the test could not be written for TensorBoard (%s)", error)


def _training_events(dataset: Dataset) -> list[int]:
    """Per item of the catalog."""
    count_N = np.zeros(dataset.num_items + 1, np.int64)
    for users in read_in_order(dataset.path, dataset.manifest):
        count_N += np.bincount(users.train.item_E, minlength=len(count_N))
    counts: list[int] = count_N[1:].tolist()
    return counts


def _table(dataset: Dataset, target: int, original: Ranked, shuffled: Ranked) -> str:
    """Both orders side by side; the next item in bold."""
    lines = ["| | original history | shuffled history |", "|---|---|---|"]
    ranks = [f"{found.rank:,} of {found.candidates:,}" for found in (original, shuffled)]
    lines.append(f"| rank of the next item | {' | '.join(ranks)} |")
    for place, items in enumerate(zip(original.top, shuffled.top, strict=True), 1):
        cells = [_escaped(dataset.titles[item - 1]) for item in items]
        cells = [f"**{cell}**" if item == target else cell for cell, item in zip(cells, items, strict=True)]
        lines.append(f"| {place} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _escaped(title: str) -> str:
    """A title as markdown shows it, whatever it holds."""
    return "".join(
        letter if letter.isalnum() or letter in " ,.-'" else f"&#{ord(letter)};" for letter in " ".join(title.split())
    )
