"""The cosine of every user's vectors for the original and the shuffled history, kept beside a run's results.

Letters: U users.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from zipfile import BadZipFile

import numpy as np

from trainer.config import Split
from trainer.evaluation.ranking import Floats, Ints
from trainer.reports.user_ranks import RANKS_FOLDER
from trainer.runs.atomic import atomic_file


@dataclass(frozen=True)
class UserSimilarity:
    """Cosines of one checkpoint."""

    dataset_fingerprint: str
    step: int
    """Optimizer step of the checkpoint."""
    user_U: Ints
    """User indices, ascending."""
    cosine_U: Floats


def write_similarity(run: Path, split: Split, found: UserSimilarity) -> None:
    """Replace the run's file of this split, at once."""
    path = _path(run, split)
    path.parent.mkdir(parents=True, exist_ok=True)
    of = np.array([found.dataset_fingerprint, str(found.step)])
    with atomic_file(path) as beside, open(beside, "wb") as file:
        np.savez(file, evaluation=of, user=found.user_U, cosine=found.cosine_U)


def read_similarity(run: Path, split: Split) -> UserSimilarity | None:
    """The run's cosines of this split; None if there are none.

    Raises:
        ValueError: the file is damaged; the message has the cure.
    """
    path = _path(run, split)
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            fingerprint, step = map(str, file["evaluation"].tolist())
            return UserSimilarity(
                fingerprint, int(step), file["user"].astype(np.int64), file["cosine"].astype(np.float64)
            )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, BadZipFile, SyntaxError, TokenError) as error:
        raise ValueError(
            f"{path} is damaged ({error}): write it again with `llm-srec evaluate {run} --similarity`"
        ) from None


def _path(run: Path, split: Split) -> Path:
    return run / RANKS_FOLDER / f"similarity-{split}.npz"
