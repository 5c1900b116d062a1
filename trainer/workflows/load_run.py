"""Open a trained run for use: its configuration, dataset, model and evaluator."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config import EvaluationConfig, RunConfig, Task
from trainer.data.reading.dataset import open_dataset
from trainer.distributed import World
from trainer.evaluation.protocol import Evaluator
from trainer.models import build_system, changed_part, load_weights
from trainer.runs.folder import Checkpoint, CheckpointError
from trainer.runs.preflight import checked_run


@dataclass(frozen=True)
class TrainedRun:
    """The best checkpoint of a run, on its device and in evaluation mode."""

    config: RunConfig
    checkpoint: Checkpoint
    model: Any
    evaluator: Evaluator


def open_run(
    path: Path, world: World, evaluation: EvaluationConfig | None = None, task: Task | None = None
) -> TrainedRun:
    """Load the run's best checkpoint.

    Args:
        evaluation: instead of the run's own evaluation settings.
        task: whose candidates are ranked instead of the run's own.

    Raises:
        ValueError: no run folder, no validation yet, a damaged checkpoint, or the dataset, LLM or teacher is not the
            one that the run was trained with.
    """
    config, checkpoint = checked_run(path)
    dataset = open_dataset(config.data.path, full_check=False)
    system = build_system(config, dataset)
    if other := changed_part(checkpoint.identity, system):
        raise CheckpointError(f"the {other} of {path} is not the one it was trained with: put that one back")
    load_weights(system.model, checkpoint)
    model = system.model.to(world.device).eval()
    return TrainedRun(
        config,
        checkpoint,
        model,
        Evaluator(dataset, system.collator, evaluation or config.evaluation, world, task or config.task),
    )
