"""How far a user's vector moves when the history is shuffled (KDD'25, Table 5).

Letters: U users, D width of the vectors.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from trainer.config import Split
from trainer.data.reading.counter_rng import IntArray
from trainer.evaluation.protocol import Ranking
from trainer.evaluation.ranking import Floats, mean_per_user


def user_similarity(ranking: Ranking, split: Split = "test") -> tuple[IntArray, Floats]:
    """User indices (U,) of a split, and the cosine (U,) of their vectors for the original and the shuffled history, the
    mean over several test targets.

    Collective: each rank encodes its share, and all ranks get all users. The vectors are those that rank items
    (`user_vectors`): f_user(h_U) of an LLM recommender. Only the items that the system reads are shuffled, with the
    order of the shuffled test.

    Raises:
        ValueError: the system scores titles and has no vectors, or no user has a target in the split.
    """
    held_out, original_UD = ranking.user_vectors(split)
    _, shuffled_UD = ranking.user_vectors(split, "shuffled")
    user_T = held_out.histories.user_U
    cosine_T = cosines(original_UD.float().numpy(), shuffled_UD.float().numpy())
    return np.unique(user_T), mean_per_user(user_T, cosine_T)


def cosines(first_UD: npt.NDArray[Any], second_UD: npt.NDArray[Any]) -> Floats:
    """(U,) cosine of two vectors per user, in float64; 0 if one of them is 0."""
    first_UD, second_UD = first_UD.astype(np.float64), second_UD.astype(np.float64)
    norm_U = np.linalg.norm(first_UD, axis=1) * np.linalg.norm(second_UD, axis=1)
    product_U: Floats = (first_UD * second_UD).sum(1)
    return product_U / np.where(norm_U > 0, norm_U, 1.0)
