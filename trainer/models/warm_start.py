"""Weights of a trained run in the model of a new one: rows of item tables follow the raw ids of their items.

Letters: N items of the new dataset, K items that both datasets have.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from trainer.data.raw.items import RawItems
from trainer.data.reading.counter_rng import IntArray
from trainer.data.reading.dataset import Dataset, read_user_ids
from trainer.models.system import AnySystem
from trainer.nn.saved_buffers import saved_buffers
from trainer.runs.folder import CheckpointError
from trainer.runs.warm_start import WarmStart

_TABLES = "items."
"""Prefix of the names of item tables, in every system that `find_warm_start` accepts: row i is item i, row 0 padding;
rows behind the last item belong to no item (BERT4Rec's mask token)."""


@dataclass(frozen=True)
class CarriedOver:
    """Weights that a run took over from the run that it starts from; written to `RUN/warm_start.json`."""

    init_from: str
    """The run, as configured."""
    step: int
    """Step of its best checkpoint."""
    weights_sha256: str
    items_carried: int
    """Items that both datasets have; a system with an item table starts with their trained rows."""
    items_new: int
    """Items that only the new dataset has; their rows are initialised as in a new run."""
    items_dropped: int
    """Items that only the old dataset has."""
    users_known: int
    """Users that both datasets have. No system has weights per user."""
    users_new: int
    parameters_carried: int
    """Trained numbers that were taken over."""
    parameters_new: int
    """Trained numbers that were initialised."""
    teacher_follows: bool
    """See `WarmStart.teacher_follows`."""

    def summary(self) -> str:
        """One line for the log."""
        return (
            f"started from {self.init_from}, step {self.step}: {self.items_carried:,} items carried over, "
            f"{self.items_new:,} new, {self.items_dropped:,} dropped; {self.users_known:,} users known, "
            f"{self.users_new:,} new; {self.parameters_carried:,} parameters carried over, {self.parameters_new:,} new"
        )


@torch.no_grad()
def carry_over(warm: WarmStart, system: AnySystem, dataset: Dataset) -> CarriedOver:
    """Copy the weights of the run into the system's model, in place.

    Raises:
        CheckpointError: another language model, or weights that do not fit.
    """
    found = warm.checkpoint
    if found.identity.llm != system.llm:
        raise CheckpointError(
            f"train.init_from={warm.path} was trained with another language model: set system.llm to that of "
            f"{warm.path / 'config.yaml'}"
        )
    old_items, new_items = _ids(warm.data, warm.manifest.num_items), _ids(dataset.path, dataset.num_items)
    old_K, new_K = _shared(old_items, new_items)
    weights = load_file(found.weights)
    trained: dict[str, Tensor] = {n: p for n, p in system.model.named_parameters() if p.requires_grad}
    trained |= saved_buffers(system.model)
    if differing := sorted(set(weights) ^ set(trained)):
        raise _misfit(warm, differing[0])
    new_numbers = 0
    for name, target in trained.items():
        source = weights[name]
        if name.startswith(_TABLES):
            _copy_rows(source, target, old_K, new_K, len(old_items), len(new_items))
            new_numbers += (len(new_items) - len(new_K)) * target[0].numel()
        elif source.shape != target.shape:
            raise _misfit(warm, name)
        else:
            target.copy_(source)
    known = len(set(read_user_ids(warm.data)) & set(read_user_ids(dataset.path)))
    total = sum(target.numel() for target in trained.values())
    return CarriedOver(
        init_from=str(warm.path),
        step=found.progress.step,
        weights_sha256=found.weights_sha256,
        items_carried=len(new_K),
        items_new=len(new_items) - len(new_K),
        items_dropped=len(old_items) - len(new_K),
        users_known=known,
        users_new=dataset.manifest.num_users - known,
        parameters_carried=total - new_numbers,
        parameters_new=new_numbers,
        teacher_follows=warm.teacher_follows,
    )


def _copy_rows(source: Tensor, target: Tensor, old_K: IntArray, new_K: IntArray, old: int, new: int) -> None:
    """Copy padding, the rows of shared items, and the rows behind the last item."""
    target[0] = source[0]
    target[torch.from_numpy(new_K)] = source[torch.from_numpy(old_K)].to(target.dtype)
    target[1 + new :] = source[1 + old :]


def _ids(path: Path, num_items: int) -> tuple[str, ...]:
    return RawItems.read(path, num_items).ids


def _shared(old: tuple[str, ...], new: tuple[str, ...]) -> tuple[IntArray, IntArray]:
    """(K,) items of the old and of the new catalog with the same raw ids, numbered from 1."""
    place = {raw_id: item for item, raw_id in enumerate(old, 1)}
    pairs = [(place[raw_id], item) for item, raw_id in enumerate(new, 1) if raw_id in place]
    old_K, new_K = np.array(pairs, np.int64).reshape(-1, 2).T
    return old_K, new_K


def _misfit(warm: WarmStart, name: str) -> CheckpointError:
    return CheckpointError(
        f"train.init_from={warm.path}: its weights do not fit this run ({name} differs): use the system settings of "
        f"{warm.path / 'config.yaml'}, or train from scratch"
    )
