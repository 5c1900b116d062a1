"""Measure how far a trained run's user vectors move when histories are shuffled."""

from __future__ import annotations

from collections.abc import Sequence

from trainer.config import EvaluationConfig, Split
from trainer.distributed import World
from trainer.evaluation.order.similarity import user_similarity
from trainer.evaluation.ranking import bootstrap
from trainer.reports.user_similarity import UserSimilarity, write_similarity
from trainer.runs.preflight import SavedRun
from trainer.workflows.load_run import load_run


def similarity(
    saved: SavedRun, world: World, settings: EvaluationConfig, splits: Sequence[Split], *, keep: bool
) -> list[str]:
    """One line per split with the mean cosine and its interval; every rank calls it.

    Args:
        keep: also keep each user's cosine in the run folder.

    Raises:
        ValueError: the system has no user vectors, or no user has a target in a split.
    """
    run = load_run(saved, world, settings)
    ranking, lines = run.evaluator.at_current_weights(kept=run.kept), []
    for split in dict.fromkeys(splits):
        user_U, cosine_U = user_similarity(ranking, split)
        if keep and world.is_main:
            found = UserSimilarity(run.dataset.manifest.fingerprint, run.checkpoint.progress.step, user_U, cosine_U)
            write_similarity(saved.config.output, split, found)
        mean = bootstrap(cosine_U, seed=settings.seed)
        lines.append(
            f"{saved.config.output.name} {split}: cosine of user vectors, original and shuffled history "
            f"{mean.value:.4f} ±{mean.half_width:.4f} ({len(user_U):,} users)"
        )
    return lines
