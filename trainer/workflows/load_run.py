"""Load a trained run for evaluation or recommendation: its configuration, dataset, model and evaluator."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trainer.config import EvaluationConfig, RunConfig, Task
from trainer.config.section import Section
from trainer.data.reading.dataset import Dataset, open_dataset
from trainer.distributed import World
from trainer.evaluation.item_vectors import ItemVectorFile, item_vectors
from trainer.evaluation.protocol import Evaluator
from trainer.models import AnySystem, build_system, changed_dependency, load_weights
from trainer.runs.exported import ITEM_VECTORS, BaseModel, base_model_key
from trainer.runs.folder import Checkpoint, CheckpointError
from trainer.runs.preflight import SavedRun
from trainer.workflows.item_vectors import item_vector_file


@dataclass(frozen=True)
class LoadedRun:
    """A run with the weights of its best checkpoint, on the device and in evaluation mode."""

    config: RunConfig
    checkpoint: Checkpoint
    dataset: Dataset
    system: AnySystem
    evaluator: Evaluator
    kept: ItemVectorFile | None
    """File for the item vectors of this checkpoint; None where they are not worth keeping."""
    exported: Path | None = None
    """File with the item vectors of an exported run; None: a run folder."""

    @cached_property
    def item_vectors(self) -> Tensor:
        """(N, D) vectors of items 1 to N, on every rank, which all ask for them together.

        Raises:
            ValueError: the system scores titles and has no vectors.
        """
        if self.exported is not None:
            return torch.from_numpy(np.load(self.exported)).to(self.evaluator.world.device)
        return item_vectors(self.system.vectors, self.dataset.num_items, self.evaluator.batches, self.kept)


def load_run(
    saved: SavedRun,
    world: World,
    evaluation: EvaluationConfig | None = None,
    task: Task | None = None,
    *,
    exact: bool = True,
) -> LoadedRun:
    """Load a run's best checkpoint.

    Args:
        saved: the run, from `check_saved_run` or `check_loadable`.
        evaluation: evaluation settings that replace the run's own.
        task: task whose candidates are ranked; None: the run's own.
        exact: use item vectors from the run folder only if encoding them again would give the same bits.

    Raises:
        ValueError: the LLM or a run that it builds on is missing, or differs from the one that it was trained with.
    """
    config, checkpoint = saved.config, saved.checkpoint
    dataset = open_dataset(
        config.data.path, full_check=False, manifest=saved.manifest, repeat_dates=config.data.repeat_dates
    )
    if saved.export is not None:
        dataset = replace(dataset, has_users=False)
        if saved.export.base_model is not None:
            _check_fingerprint(config, saved.export.base_model)
    system = build_system(config, dataset)
    if other := changed_dependency(checkpoint.identity, system):
        raise CheckpointError(
            f"the {other} of {config.output} is not the one it was trained with: restore the original"
        )
    load_weights(system.model, checkpoint)
    system.model.to(world.device)
    system.model.eval()
    evaluator = Evaluator(dataset, system.scoring, evaluation or config.evaluation, world, task or config.task)
    if saved.export is not None:
        return LoadedRun(config, checkpoint, dataset, system, evaluator, None, config.output / ITEM_VECTORS)
    kept = item_vector_file(config, checkpoint, evaluator, exact=exact)
    return LoadedRun(config, checkpoint, dataset, system, evaluator, kept)


def _check_fingerprint(config: RunConfig, model: BaseModel) -> None:
    """Refuse another language model before its weights are loaded.

    Raises:
        CheckpointError: its fingerprint is not that of the export.
    """
    path: str = getattr(config.system, model.key).path
    if (found := base_model_fingerprint(config.system)) != model.fingerprint:
        raise CheckpointError(
            f"{path} is not the language model or text encoder that {config.output} was trained with (fingerprint "
            f"{found}, not {model.fingerprint}): give the folder or hub id of the original with --llm"
        )


def base_model_fingerprint(system: Section) -> str:
    """Fingerprint of the language model or text encoder that a system section names; empty without one."""
    match base_model_key(system):
        case "llm":
            from trainer.nn.llm.backbone import llm_fingerprint  # transformers takes seconds to import

            return llm_fingerprint(getattr(system, "llm"))  # noqa: B009 - not an attribute of every section
        case "encoder":
            from trainer.nn.text_encoder import encoder_fingerprint

            return encoder_fingerprint(getattr(system, "encoder"))  # noqa: B009
        case None:
            return ""
