"""The ranks of every user's targets, kept beside a run's results, so that two runs can be compared user by user.

A difference of two systems on the same users varies less than either system does: its interval is computed from the
users' differences (paired bootstrap), not from the two intervals.

Letters: U users, T targets: one per user, except in the test of a split with successive targets; K length of a list.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from tokenize import TokenError
from typing import Any
from zipfile import BadZipFile

import numpy as np

from trainer.config import Tie
from trainer.evaluation.ranking import Estimate, Floats, Ints, Ranks, bootstrap, mean_per_user, metrics_per_target
from trainer.reports.results import Result
from trainer.runs.atomic import atomic_file

RANKS_FOLDER = "ranks"
"""Folder of the files in a run folder."""


@dataclass(frozen=True)
class UserRanks:
    """Ranks of one evaluation."""

    user_T: Ints
    """Index of the user of each target, ascending."""
    ranks: Ranks
    top_TK: Ints = field(default_factory=lambda: np.zeros((0, 0), np.int64))
    """Item ids that would be recommended before each target, best first, padded with 0; K is 0 if none were listed."""

    @property
    def user_U(self) -> Ints:
        """User indices, ascending."""
        return np.unique(self.user_T)

    def last_targets(self) -> UserRanks:
        """The ranks of each user's last target alone, without lists."""
        last = np.flatnonzero(np.diff(np.append(self.user_T, -1)))
        ranks = self.ranks
        kept = Ranks(ranks.greater[last], ranks.ties[last], ranks.candidates[last])
        return UserRanks(self.user_T[last], kept)

    def metric(self, name: str, tie: Tie) -> Floats:
        """(U,) one of `METRIC_NAMES` per user, the mean over its targets."""
        return self.metrics(tie)[name]

    def metrics(self, tie: Tie) -> dict[str, Floats]:
        """(U,) each of `METRIC_NAMES` per user, the mean over its targets."""
        return {name: self.mean(value_T) for name, value_T in metrics_per_target(self.ranks, tie=tie).items()}

    def mean(self, value_T: Floats) -> Floats:
        """(U,) mean of a value over each user's targets."""
        return mean_per_user(self.user_T, value_T)


def write_ranks(run: Path, result: Result, found: UserRanks) -> None:
    """Replace the file of the newest evaluation of this kind, at once."""
    path = _path(run, result)
    path.parent.mkdir(parents=True, exist_ok=True)
    ranks = found.ranks
    lists: dict[str, Any] = {"top": found.top_TK} if found.top_TK.shape[1] else {}
    with atomic_file(path) as beside, open(beside, "wb") as file:
        np.savez(
            file,
            evaluation=np.array([result.dataset_fingerprint, str(result.step)]),
            user=found.user_T,
            greater=ranks.greater,
            ties=ranks.ties,
            candidates=ranks.candidates,
            **lists,
        )


def read_ranks(run: Path, result: Result) -> UserRanks:
    """The ranks behind a result.

    Raises:
        ValueError: there are none, or they are of a different checkpoint or dataset; the message has the cure.
    """
    path = _path(run, result)
    flags = f" --candidates {result.candidates}" * (result.candidates != "sampled")
    flags += " --shuffle-history" * (result.history == "shuffled")
    cure = f"write them with `llm-srec evaluate {run} --split {result.split}{flags}`"
    try:
        of, columns, top_TK = _read(path)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist, and a paired comparison needs every user's rank: {cure}") from None
    except (OSError, ValueError, KeyError, TypeError, MemoryError, BadZipFile, SyntaxError, TokenError) as error:
        raise ValueError(f"{path} is damaged ({error}): {cure}") from None
    if of != (result.dataset_fingerprint, str(result.step)):
        raise ValueError(f"{path} is of a different checkpoint or dataset than the newest result: {cure}")
    return UserRanks(columns[0], Ranks(*columns[1:]), top_TK)


def _read(path: Path) -> tuple[tuple[str, ...], list[Ints], Ints]:
    """The evaluation that a file is of, its columns, and its lists.

    Raises:
        ValueError, TypeError, MemoryError, OSError, KeyError, BadZipFile: it is damaged.
    """
    with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
        # Written without compression, under which a small file could fill the memory.
        if any(member.compress_type for member in file.zip.infolist()):
            raise ValueError("it is compressed")
        of = tuple(map(str, file["evaluation"].tolist()))
        columns = [file[name] for name in ("user", "greater", "ties", "candidates")]
        # Files of earlier versions have no lists.
        top_TK = file["top"] if "top" in file.files else np.zeros((len(columns[0]), 0), np.int64)
    if {(column.dtype.kind, column.shape) for column in columns} != {("i", (len(columns[0]),))}:
        raise ValueError("its columns are not whole numbers of the same targets")
    if (top_TK.dtype.kind, top_TK.ndim, len(top_TK)) != ("i", 2, len(columns[0])):
        raise ValueError("its lists are not whole numbers of the same targets")
    return of, columns, top_TK


def paired_difference(first: UserRanks, second: UserRanks, metric: str, tie: Tie, seed: int = 0) -> Estimate:
    """Mean over users of a metric of `first` minus that of `second`, with its 95 % paired bootstrap interval.

    Raises:
        ValueError: they were measured on different users.
    """
    if not np.array_equal(first.user_T, second.user_T):
        raise ValueError("the two evaluations have different users: evaluate both runs with the same evaluation.users")
    return bootstrap(first.metric(metric, tie) - second.metric(metric, tie), seed)


def _path(run: Path, result: Result) -> Path:
    name = f"{result.split}-{result.task}-{result.candidates}-{result.history}.npz"
    return run / RANKS_FOLDER / name
