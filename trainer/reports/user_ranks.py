"""The rank of every user's target, kept beside a run's results, so that two runs can be compared user by user.

A difference of two systems on the same users varies less than either system does: its interval is computed from the
users' differences (paired bootstrap), not from the two intervals.

Letters: U users, K length of a list.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from tokenize import TokenError
from typing import Any
from zipfile import BadZipFile

import numpy as np

from trainer.config import Tie
from trainer.evaluation.ranking import Estimate, Floats, Ints, Ranks, bootstrap, per_user_metrics
from trainer.reports.results import Result
from trainer.runs.atomic import atomic_file

RANKS_FOLDER = "ranks"
"""Folder of the files in a run folder."""


@dataclass(frozen=True)
class UserRanks:
    """Ranks of one evaluation."""

    user_U: Ints
    """User indices, ascending."""
    ranks: Ranks
    top_UK: Ints = field(default_factory=lambda: np.zeros((0, 0), np.int64))
    """Item ids that each user would be recommended, best first, padded with 0; K is 0 if none were listed."""

    def metric(self, name: str, tie: Tie) -> Floats:
        """(U,) one of `METRIC_NAMES` per user."""
        return per_user_metrics(self.ranks, tie=tie)[name]


def write_ranks(run: Path, result: Result, found: UserRanks) -> None:
    """Replace the file of the newest evaluation of this kind, at once."""
    path = _path(run, result)
    path.parent.mkdir(parents=True, exist_ok=True)
    ranks = found.ranks
    lists: dict[str, Any] = {"top": found.top_UK} if found.top_UK.shape[1] else {}
    with atomic_file(path) as beside, open(beside, "wb") as file:
        np.savez(
            file,
            evaluation=np.array([result.dataset_fingerprint, str(result.step)]),
            user=found.user_U,
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
        of, columns, top_UK = _read(path)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist, and a paired comparison needs every user's rank: {cure}") from None
    except (OSError, ValueError, KeyError, TypeError, MemoryError, BadZipFile, SyntaxError, TokenError) as error:
        raise ValueError(f"{path} is damaged ({error}): {cure}") from None
    if of != (result.dataset_fingerprint, str(result.step)):
        raise ValueError(f"{path} is of a different checkpoint or dataset than the newest result: {cure}")
    return UserRanks(columns[0], Ranks(*columns[1:]), top_UK)


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
        top_UK = file["top"] if "top" in file.files else np.zeros((len(columns[0]), 0), np.int64)
    if {(column.dtype.kind, column.shape) for column in columns} != {("i", (len(columns[0]),))}:
        raise ValueError("its columns are not whole numbers of the same users")
    if (top_UK.dtype.kind, top_UK.ndim, len(top_UK)) != ("i", 2, len(columns[0])):
        raise ValueError("its lists are not whole numbers of the same users")
    return of, columns, top_UK


def paired_difference(first: UserRanks, second: UserRanks, metric: str, tie: Tie, seed: int = 0) -> Estimate:
    """Mean over users of a metric of `first` minus that of `second`, with its 95 % paired bootstrap interval.

    Raises:
        ValueError: they were measured on different users.
    """
    if not np.array_equal(first.user_U, second.user_U):
        raise ValueError("the two evaluations have different users: evaluate both runs with the same evaluation.users")
    return bootstrap(first.metric(metric, tie) - second.metric(metric, tie), seed)


def _path(run: Path, result: Result) -> Path:
    name = f"{result.split}-{result.task}-{result.candidates}-{result.history}.npz"
    return run / RANKS_FOLDER / name
