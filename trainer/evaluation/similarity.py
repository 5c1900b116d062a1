"""How far a user's vector moves when the history is shuffled (KDD'25, Table 5).

Letters: U users, B users of a batch, D width of the vectors.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from trainer.config import Split
from trainer.data.reading.counter_rng import IntArray
from trainer.data.reading.histories import Histories
from trainer.data.reading.shards import read_in_order
from trainer.evaluation.protocol import Evaluator
from trainer.evaluation.ranking import Floats
from trainer.models.scoring import VectorScoring
from trainer.runs.batch_shares import share, share_sizes


@torch.no_grad()
def user_similarity(evaluator: Evaluator, split: Split = "test") -> tuple[IntArray, Floats]:
    """User indices (U,) of a split, and the cosine (U,) of their vectors for the original and the shuffled history.

    Collective: each rank encodes its share, and all ranks get all users. The vectors are those that rank items
    (`user_vectors`): f_user(h_U) of an LLM recommender. Only the items that the system reads are shuffled, with the
    order of the shuffled test.

    Raises:
        ValueError: the system scores titles and has no vectors, or no user has a target in the split.
    """
    scoring = evaluator.scoring
    if not isinstance(scoring, VectorScoring):
        raise ValueError("a system of task=generation has no user vectors to compare: train one with task=retrieval")
    world, settings = evaluator.world, evaluator.config
    user_parts, cosine_parts = [], []
    for histories in _histories(evaluator, split):
        mine = histories.take(share(len(histories), world.rank, world.size))
        parts = [torch.zeros(0, device=world.device)]
        for batch in evaluator.batches.of(len(histories)):
            original = mine.take(batch).last(scoring.collator.max_history)
            vectors = [
                scoring.user_vectors(each, world.device).vector_BD
                for each in (original, original.shuffled(settings.seed))
            ]
            parts.append(_cosine(*vectors))
        whole_B = world.all_gather_results(torch.cat(parts), share_sizes(len(histories), world.size))
        user_parts.append(histories.user_U)
        cosine_parts.append(whole_B.double().cpu().numpy())
    if not sum(map(len, user_parts)):
        raise ValueError(f"no user of {evaluator.dataset.path} has a {split} item: build it with a lower --min-train")
    return np.concatenate(user_parts), np.concatenate(cosine_parts)


def _histories(evaluator: Evaluator, split: Split) -> Iterator[Histories]:
    """Histories of the split's users, group by group; of the sampled users if `evaluation.users` is set."""
    chosen = evaluator.sampled_users()
    for users in read_in_order(evaluator.dataset.path, evaluator.dataset.manifest):
        histories, _ = users.targets(split)
        yield histories if chosen is None else histories.take(np.flatnonzero(np.isin(histories.user_U, chosen)))


def _cosine(first_BD: Tensor, second_BD: Tensor) -> Tensor:
    """(B,) cosines, summed in fp32."""
    return torch.nn.functional.cosine_similarity(first_BD.float(), second_BD.float(), dim=1)
