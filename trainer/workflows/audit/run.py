"""The order audit of a trained run.

Letters: U users, D width of the vectors, N items.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from trainer.config import EvaluationConfig
from trainer.data.reading.dataset import Dataset
from trainer.data.reading.histories import Histories
from trainer.data.reading.shards import read_in_order, read_users
from trainer.distributed import World
from trainer.evaluation.order.audit import AuditInput, VectorAnswers, Vectors
from trainer.evaluation.order.groups import adjacent_pairs, transition_scores
from trainer.evaluation.ranking import Floats, Ints
from trainer.runs.preflight import SavedRun
from trainer.workflows.load_run import load_run


def run_input(
    saved: SavedRun, world: World, settings: EvaluationConfig, trained_shuffled: SavedRun | None = None
) -> AuditInput:
    """Compute the vectors of a run's test users, for original and shuffled histories; every rank calls it.

    Args:
        settings: evaluation settings: users, seed, batch size.
        trained_shuffled: a run of the same system that was trained on shuffled histories.

    Raises:
        ValueError: a run scores titles and has no vectors, or users have several test targets.
    """
    run = load_run(saved, world, settings)
    if run.dataset.manifest.successive_after is not None:
        raise ValueError(f"an audit needs one test target per user: build {run.dataset.path} with another --target")
    item_ND = _numpy(run.item_vectors)
    ranking = run.evaluator.at_current_weights(kept=run.kept)
    held_out, user_UD = ranking.user_vectors("test")
    _, shuffled_UD = ranking.user_vectors("test", "shuffled")
    other: VectorAnswers | None = None
    if trained_shuffled is not None:
        second = load_run(trained_shuffled, world, settings)
        _, vector_UD = second.evaluator.at_current_weights(kept=second.kept).user_vectors("test")
        other = VectorAnswers(_numpy(vector_UD), _numpy(second.item_vectors))
    histories = held_out.histories
    # The paper's score, and that of Figure 3: of the sequence that a user was trained on, not of the test history.
    sequences = read_users(run.dataset.path, run.dataset.manifest, histories.user_U).sequences()
    event_N, scores = _training_counts(run.dataset, sequences)
    bounds = zip(histories.offset_U1[:-1], histories.offset_U1[1:], strict=True)
    return AuditInput(
        name=saved.config.output.name,
        num_items=run.dataset.num_items,
        target_U=held_out.target_B,
        original=VectorAnswers(_numpy(user_UD), item_ND),
        shuffled=VectorAnswers(_numpy(shuffled_UD), item_ND),
        trained_shuffled=other,
        seen=[histories.item_E[start:end] for start, end in bounds],
        transition_score_U=scores,
        event_N=event_N,
    )


def _training_counts(dataset: Dataset, histories: Histories) -> tuple[Ints, Floats]:
    """Training events of items 1 to N, and the transition scores of some users' sequences."""
    row_P, key_P = adjacent_pairs(histories.item_E, histories.offset_U1, dataset.num_items)
    # Only pairs of these histories are counted, so that memory does not grow with the dataset.
    wanted = np.unique(key_P)
    count = np.zeros(len(wanted) + 1, np.int64)
    event_N = np.zeros(dataset.num_items + 1, np.int64)
    for users in read_in_order(dataset.path, dataset.manifest):
        event_N += np.bincount(users.train.item_E, minlength=len(event_N))
        _, key = adjacent_pairs(users.train.item_E, users.train.offset_U1, dataset.num_items)
        place = np.searchsorted(wanted, key)
        known = np.append(wanted, -1)[place] == key
        count += np.bincount(place[known], minlength=len(count))
    count_P = count[np.searchsorted(wanted, key_P)]
    return event_N[1:], transition_scores(row_P, count_P, len(histories))


def _numpy(vector_UD: Tensor) -> Vectors:
    array: Vectors = vector_UD.float().cpu().numpy()
    return array
