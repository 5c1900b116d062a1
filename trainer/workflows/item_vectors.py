"""What decides the item vectors of a run's checkpoint."""

from __future__ import annotations

from trainer.config import RunConfig, config_hash, with_absolute_paths
from trainer.device import rounding
from trainer.evaluation.item_vectors import ItemVectorFile
from trainer.evaluation.protocol import Evaluator
from trainer.models.scoring import VectorScoring
from trainer.runs.commit import software
from trainer.runs.folder import Checkpoint, RunFolder

_ROUNDING = ("batch_size", "ranks", "rounding", "software")


def item_vector_file(
    config: RunConfig, checkpoint: Checkpoint, evaluator: Evaluator, *, exact: bool = True
) -> ItemVectorFile | None:
    """The file in the run folder that keeps the item vectors of a checkpoint; None if they are not worth keeping.

    Args:
        exact: see `ItemVectorFile`.

    Vectors also depend, in their last bits, on which items are encoded together, on how many ranks and on what device.
    """
    scoring = evaluator.scoring
    if not isinstance(scoring, VectorScoring) or not scoring.costly_items:
        return None
    facts: dict[str, object] = {
        "weights": checkpoint.weights_sha256,
        "identity": checkpoint.identity.as_dict(),  # with the dataset, the LLM and the runs that it builds on
        "config": config_hash(config),
        # Whole, because the hash leaves out what resuming may change: kernels, prefix cache.
        "system": with_absolute_paths(config).system.model_dump(mode="json"),
        "batch_size": evaluator.config.batch_size,
        "ranks": evaluator.world.size,
        "rounding": rounding(),
        "software": software(),
    }
    return ItemVectorFile(RunFolder(config.output).item_vectors, facts, _ROUNDING, exact)
