"""The Python API: what the commands do, with the ids of the reviews and never the trainer's own numbers.

    import trainer

    run = trainer.train("sasrec", ["data.path=data/ml-100k", "output=runs/sasrec"])
    run = trainer.load_run("runs/sasrec")
    run.recommend([["Toy Story (1995)", "Fargo (1996)"]], k=5)
    run.recommend(users=["196", "22"])
    run.evaluate()["test"].metrics["HR@10"].value
    run.item_vectors().vectors

`import trainer` and `load_run` import no torch: a mistyped id fails in a second. docs/python_api.md has more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from trainer.config import Candidates, ConfigError, HistoryOrder, RunConfig, Split, Task, load_config
from trainer.data.raw.history import History, Unknown
from trainer.data.raw.items import RawItems
from trainer.data.raw.users import find_users
from trainer.data.reading.counter_rng import IntArray
from trainer.data.reading.dataset import read_user_ids
from trainer.runs.exported import base_model_key
from trainer.runs.folder import RunFolder
from trainer.runs.launch_env import launched_world_size
from trainer.runs.lock import check_not_locked
from trainer.runs.preflight import SavedRun, check_loadable, preflight
from trainer.runs.requirements import check_recommends, check_task
from trainer.workflows.exporting.checks import IndexKind
from trainer.workflows.recommending.asking import Asked, ask_all, ask_histories, ask_users, find_candidates, latest_time

if TYPE_CHECKING:  # these import torch
    from trainer.reports.results import Result
    from trainer.workflows.load_run import LoadedRun
    from trainer.workflows.recommending.recommend import Recommendation, Recommendations, Recommender, SeenItem

__all__ = [
    "History",
    "ItemVectors",
    "Recommendation",
    "Recommendations",
    "Run",
    "SeenItem",
    "load_config",
    "load_run",
    "train",
]


@dataclass(frozen=True)
class ItemVectors:
    """Vectors of all items of a catalog; row i belongs to `item_ids[i]`."""

    item_ids: tuple[str, ...]
    titles: tuple[str, ...]
    vectors: npt.NDArray[np.float32]
    """(N, D). A user's score of an item is the inner product of their vectors."""


def train(config: RunConfig | Path | str, overrides: Sequence[str] = ()) -> Run:
    """Train or resume a run and test its best checkpoint, as `llm-srec train` does; a finished run is not repeated.

    Every rank of a run calls it.

    Args:
        config: a configuration from `load_config`, a YAML file, or the name of a preset such as "sasrec".
        overrides: changes to a preset, each `section.key=value`.

    Returns:
        The trained run, on every rank.

    Raises:
        ValueError: the run cannot start, its loss is not finite, or its dataset was replaced.
        OSError: its last checkpoint could not be written.
    """
    if isinstance(config, RunConfig):
        if overrides:
            raise ConfigError("a loaded configuration takes no overrides: give them to load_config")
    else:
        config = load_config(config, overrides)
    check_not_locked(RunFolder(config.output))
    checked = preflight(config, launched_world_size())

    from trainer.workflows.train import train as train_checked  # imports torch

    train_checked(checked)
    return load_run(config.output)


def load_run(path: Path | str, *, llm: Path | str | None = None, data: Path | str | None = None) -> Run:
    """Open a trained run by its folder, or an export; its model is loaded when it is first needed.

    An export ranks as its run does. It has no users: it recommends after histories, and cannot be evaluated.

    Args:
        llm: folder or hub id of the run's language model or text encoder; None: where it was in training.
        data: folder of the run's dataset; None: where it was in training.

    Raises:
        ValueError: not a run folder, no validation yet, a damaged checkpoint, or a different dataset than in training.
    """
    return Run(check_loadable(Path(path), None if llm is None else str(llm), None if data is None else Path(data)))


class Run:
    """A trained run, with the weights of its best checkpoint.

    It holds the model in memory from the first use on. Not meant for several threads at once.
    """

    def __init__(self, saved: SavedRun) -> None:
        self._saved = saved

    def __repr__(self) -> str:
        return f"<Run {self.path}: {self.config.system.name}, step {self._saved.checkpoint.progress.step}>"

    @property
    def path(self) -> Path:
        """The run folder."""
        return self._saved.config.output

    @property
    def config(self) -> RunConfig:
        """The configuration that the run was trained with."""
        return self._saved.config

    @cached_property
    def items(self) -> RawItems:
        """Raw ids and titles of the items of its dataset."""
        return RawItems.read(self._saved.config.data.path, self._saved.manifest.num_items)

    @cached_property
    def user_ids(self) -> tuple[str, ...]:
        """Raw ids of the users of its dataset: those who were not filtered out when it was built.

        Raises:
            ConfigError: it is an export.
        """
        self._check_has_users()
        return tuple(read_user_ids(self._saved.config.data.path))

    def recommend(
        self,
        histories: Sequence[History | Sequence[str]] | None = None,
        *,
        users: Sequence[str] | Literal["all"] | None = None,
        k: int = 10,
        exclude_seen: bool = True,
        candidates: Sequence[str] | None = None,
        unknown: Unknown = "error",
    ) -> list[Recommendations]:
        """The `k` best items after each history, in order; arguments as in `recommend_each`."""
        return list(
            self.recommend_each(
                histories, users=users, k=k, exclude_seen=exclude_seen, candidates=candidates, unknown=unknown
            )
        )

    def recommend_each(
        self,
        histories: Sequence[History | Sequence[str]] | None = None,
        *,
        users: Sequence[str] | Literal["all"] | None = None,
        k: int = 10,
        exclude_seen: bool = True,
        candidates: Sequence[str] | None = None,
        unknown: Unknown = "error",
        progress: bool = False,
    ) -> Iterator[Recommendations]:
        """Recommend after each history, one after the other; all arguments are checked before the first.

        Args:
            histories: each a list of raw item ids or titles, oldest first, or a `History` with times or a name. Anyone
                can be served, also users that the dataset does not have.
            users: instead, raw ids of users of the dataset, who are served by their whole history, held-out items
                included; "all": everyone, in the order of `user_ids`.
            k: items per history; fewer where fewer are left.
            exclude_seen: leave out the items of the history.
            candidates: raw ids or titles of the items to rank; None: the whole catalog.
            unknown: what becomes of items of a history that the dataset does not have. "error"; "skip": they are left
                out; "read": their titles are read, by systems that read titles alone (tallrec, recformer).
            progress: show a progress bar on stderr, if that is a terminal.

        Raises:
            ValueError: an unknown user, item or title (with a suggestion), an empty history, or a system that cannot
                search a catalog. torch is not imported before these are found.
        """
        check_recommends(self.config)
        if k < 1:
            raise ConfigError(f"{k} items cannot be recommended: ask for at least 1")
        if (histories is None) == (users is None):
            raise ConfigError("recommend after histories, or for users: give one of the two")
        ranked_C = None if candidates is None else find_candidates(self.items, candidates)
        if histories is not None:
            asked = ask_histories(self._saved, self.items, histories, unknown)
            return self._answers(iter([asked]), len(asked), ranked_C, k, exclude_seen, progress)
        self._check_has_users()
        if users == "all":
            parts = ask_all(self._saved, self.user_ids)
            return self._answers(parts, len(self.user_ids), ranked_C, k, exclude_seen, progress)
        assert users is not None
        if isinstance(users, str) or not len(users):
            raise ConfigError(f'users={users!r}: give a list of raw user ids, or "all"')
        found_U = find_users(self.config.data.path, users)
        known = (ask_users(self._saved, users, found_U) for _ in range(1))
        return self._answers(known, len(users), ranked_C, k, exclude_seen, progress)

    def evaluate(
        self,
        splits: Sequence[Split] = ("test",),
        *,
        history: HistoryOrder = "original",
        candidates: Candidates | None = None,
        users: int | None = None,
        task: Task | None = None,
        record: bool = False,
    ) -> dict[Split, Result]:
        """Rank the held-out items, as `llm-srec evaluate` does; a metric is `result.metrics["HR@10"].value`.

        Every rank of a run calls it.

        Args:
            history: "shuffled": how well it ranks without the order of the histories.
            candidates: among which items; None: as in training.
            users: evaluate a seeded sample of this many users; None: all.
            task: the task whose stored candidates are ranked; None: as in training.
            record: append the results to those of the run folder.

        Raises:
            ValueError: no user has a target in a split, or the sample is empty.
        """
        self._check_has_users()
        settings = self.config.evaluation
        if users is not None and users < 1:
            raise ConfigError(f"users={users}: give the number of users to sample")
        changes = {name: value for name, value in (("candidates", candidates), ("users", users)) if value is not None}
        settings = settings.model_copy(update=changes)
        check_task(self.config, task or self.config.task, settings)

        from trainer.distributed import start
        from trainer.workflows import evaluate_run

        world = start(self.config.engine.threads)
        found = evaluate_run.evaluate_run(self._saved, world, settings, task, splits=splits, history=history)
        if record and world.is_main:
            for measured in found:
                evaluate_run.record(self.config, measured)
        return {measured.result.split: measured.result for measured in found}

    def item_vectors(self) -> ItemVectors:
        """Vectors of all items, from the run folder where they are kept there.

        Raises:
            ValueError: the system scores titles and has no vectors.
        """
        check_recommends(self.config)
        vectors: npt.NDArray[np.float32] = self._loaded.item_vectors.cpu().numpy()
        return ItemVectors(self.items.ids, self.items.titles, vectors)

    def user_vectors(
        self, histories: Sequence[History | Sequence[str]], *, unknown: Unknown = "error"
    ) -> npt.NDArray[np.float32]:
        """(B, D) vectors of histories, for an index of item vectors elsewhere; arguments as in `recommend_each`.

        Raises:
            ValueError: as in `recommend_each`.
        """
        check_recommends(self.config)
        asked = ask_histories(self._saved, self.items, histories, unknown)
        return self._recommender(asked.new_titles, None).user_vectors(asked.at(self._latest_time))

    def export(
        self,
        out: Path | str,
        *,
        index: IndexKind | None = None,
        onnx: bool = False,
        license: str | None = None,  # noqa: A002 - as in a model card
    ) -> Run:
        """Write the run to one folder that stands alone, as `llm-srec export` does; returns the exported run.

        Args:
            out: folder that does not exist yet.
            index: also write the item vectors as an index for faiss (extra `faiss`).
            onnx: also write the user encoder of a system that knows items by id (extra `onnx`).
            license: licence of the model card, by its identifier on the hub; None: the card names none.

        Raises:
            ValueError: the folder is not empty, an extra is not installed, or the run is an export already.
        """
        from trainer.workflows.exporting.export import ExportOptions, export

        export(self._saved, Path(out), ExportOptions(index, onnx, license))
        return load_run(out, llm=self._base_model_path)

    @property
    def _base_model_path(self) -> str | None:
        key = base_model_key(self.config.system)
        return None if key is None else str(getattr(self.config.system, key).path)

    def _check_has_users(self) -> None:
        if self._saved.export is not None:
            raise ConfigError(
                f"{self.path} is an export, which holds no users: recommend after histories, or open the run that it "
                "was made from"
            )

    @cached_property
    def _loaded(self) -> LoadedRun:
        from trainer.distributed import alone
        from trainer.workflows import load_run as loading

        return loading.load_run(self._saved, alone(self.config.engine.threads), exact=False)

    @cached_property
    def _latest_time(self) -> int:
        return latest_time(self._saved)

    def _recommender(self, new_titles: Sequence[str], candidates: IntArray | None) -> Recommender:
        from trainer.models.new_titles import reading_new_titles
        from trainer.workflows.recommending.recommend import Recommender

        run = self._loaded
        scoring = run.system.vectors
        if new_titles:
            scoring = reading_new_titles(self.config, run.system, run.dataset, new_titles)
        return Recommender(
            scoring,
            self.items,
            run.item_vectors,
            run.evaluator.world.device,
            self.config.evaluation.batch_size,
            new_titles,
            candidates,
        )

    def _answers(
        self,
        parts: Iterator[Asked],
        total: int,
        candidates: IntArray | None,
        k: int,
        exclude_seen: bool,
        progress: bool,
    ) -> Iterator[Recommendations]:
        from tqdm import tqdm

        # disable=None: no bar where stderr is not a terminal.
        with tqdm(total=total, unit="user", disable=None if progress and total > 1 else True) as bar:
            recommender = None
            for asked in parts:
                if recommender is None:
                    recommender = self._recommender(asked.new_titles, candidates)
                dated = asked if all(asked.dated_U) else asked.at(self._latest_time)
                for answer in recommender.recommend(dated, k, exclude_seen=exclude_seen):
                    yield answer
                    bar.update()
