"""Save and restore checkpoints: trained weights, saved tables and Adam's moments, as full (unsharded) tensors.

Full tensors load at any number of ranks and any ZeRO stage. A checkpoint is written to a hidden sibling folder, synced
and renamed into place; see `trainer/runs/folder.py` for the layout. DeepSpeed's own format is not used: it is pickled,
tied to the number of ranks, and its `latest` pointer is not atomic.
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from shards.manifest import file_sha256
from trainer.engine.engine import Engine
from trainer.engine.rank_status import NonFiniteError, in_words, ranks_that_differ
from trainer.nn.saved_buffers import saved_buffers
from trainer.runs.atomic import sync, write_atomically
from trainer.runs.folder import (
    FILES,
    MOMENTS,
    STATE,
    WEIGHTS,
    Checkpoint,
    Identity,
    Progress,
    RunFolder,
    files_json,
    state_json,
)

log = logging.getLogger(__name__)

_MOMENTS = ("exp_avg", "exp_avg_sq")


def save(
    engine: Engine[Any, Any], run: RunFolder, progress: Progress, identity: Identity, *, best: bool, keep: int
) -> bool:
    """Write the checkpoint of `progress.step`; every rank calls it, rank 0 writes.

    A failed write, such as on a full disk, loses this checkpoint only and does not raise.

    Args:
        best: mark it as the best checkpoint.
        keep: number of newest checkpoints to keep besides the best one.

    Returns:
        Whether it was written; the same on every rank.

    Raises:
        NonFiniteError: on every rank alike; nothing was written. A run could resume from the checkpoint before.
    """
    with engine.world.heartbeat.collective():
        weights, moments = _gather(engine)
    _check_finite(engine, progress.step)
    written = True
    if engine.world.is_main:
        try:
            _write(run, weights, moments, progress, identity)
            if best:
                write_atomically(run.checkpoints / "best.json", run.best_json(progress.step))
            _remove_old(run, progress, keep)
        except (OSError, SafetensorError) as error:
            written = False
            # A partial checkpoint would keep the disk full for the next save.
            shutil.rmtree(_temporary(run, progress.step), ignore_errors=True)
            existing = ", ".join(map(str, run.steps())) or "none"
            log.warning(
                "the checkpoint of step %d could not be written (%s); training continues and will retry at the next "
                "save (checkpoints of steps: %s)", progress.step, error, existing,
            )  # fmt: skip
    return bool(engine.world.broadcast_value(written))


def repair_best(run: RunFolder, step: int) -> None:
    """Point `best.json` at the best step recorded in the checkpoint that the run resumes from.

    The two differ after a kill between writing a checkpoint and its `best.json`, or when a damaged checkpoint is
    skipped.
    """
    marker = run.checkpoints / "best.json"
    if not (run.step_path(step) / FILES).is_file():
        return
    wanted = run.best_json(step)
    if not marker.is_file() or marker.read_bytes() != wanted.encode():
        write_atomically(marker, wanted)


def _write(
    run: RunFolder, weights: dict[str, Tensor], moments: dict[str, Tensor], progress: Progress, identity: Identity
) -> None:
    for leftover in run.checkpoints.glob(".*-step-*"):  # of interrupted saves
        shutil.rmtree(leftover)
    target, temporary = run.step_path(progress.step), _temporary(run, progress.step)
    temporary.mkdir(parents=True)
    save_file(weights, temporary / WEIGHTS)
    save_file(moments, temporary / MOMENTS)
    (temporary / STATE).write_text(state_json(progress, identity))
    digests = {name: file_sha256(temporary / name) for name in (WEIGHTS, MOMENTS, STATE)}
    (temporary / FILES).write_text(files_json(digests))
    # Contents must reach the disk before the rename makes them visible.
    for name in (*digests, FILES, "."):
        sync(temporary / name)
    if target.exists():  # a run stopped before its validation saves the same step again after it
        _rename_for_removal(target)
    os.rename(temporary, target)
    sync(run.checkpoints)  # the rename itself


def _temporary(run: RunFolder, step: int) -> Path:
    target = run.step_path(step)
    return target.with_name(f".writing-{target.name}")


def _remove_old(run: RunFolder, progress: Progress, keep: int) -> None:
    for step in run.steps()[:-keep]:
        if step != progress.best_step:
            _rename_for_removal(run.step_path(step))
    for removed in run.checkpoints.glob(".removed-*"):
        shutil.rmtree(removed)


def _rename_for_removal(checkpoint: Path) -> None:
    """Rename a checkpoint before deleting it, so that a kill during deletion leaves no broken one under its name."""
    os.rename(checkpoint, checkpoint.with_name(f".removed-{checkpoint.name}"))


def restore_moments(engine: Engine[Any, Any], checkpoint: Checkpoint) -> None:
    """Restore Adam's moments and step count; the weights were loaded into the model before DeepSpeed wrapped it."""
    moments = load_file(checkpoint.moments)
    step = torch.tensor(float(checkpoint.progress.step))
    for name, parameter in engine.trained.items():
        if engine.zero_stage == 0:
            state = engine.deepspeed.optimizer.state[parameter]
            state["step"] = step.clone()
            for key in _MOMENTS:
                state[key] = moments[f"{name}.{key}"].to(parameter.device)
    if engine.zero_stage:
        create_partitioned_state(engine, step)
        for name, parameter in engine.trained.items():
            for key in _MOMENTS:
                _set_partitioned(engine, parameter, moments[f"{name}.{key}"].to(engine.world.device), key)


def _check_finite(engine: Engine[Any, Any], step: int) -> None:
    """Refuse weights and moments that would make the checkpoint useless: each rank looks at those that it updates.

    Raises:
        NonFiniteError: on every rank alike.
    """
    if engine.zero_stage == 0:
        held: list[Tensor] = list(engine.trained.values())
        optimizer = engine.deepspeed.optimizer
    else:
        held, optimizer = _partitions(engine), engine.deepspeed.optimizer.optimizer
    moments = [optimizer.state[tensor][key] for tensor in held for key in _MOMENTS]
    finite = all(bool(tensor.detach().isfinite().all()) for tensor in [*held, *moments])
    finite_R = engine.world.all_gather_value(float(finite))
    if not all(finite_R):
        ranks = ranks_that_differ([bool(finite) for finite in finite_R])
        raise NonFiniteError(
            f"step {step}: trained weights or Adam's moments{in_words(ranks)} are NaN or infinite, although the loss "
            "and the gradient were not, so no checkpoint of them is written. The same command resumes from the one "
            "before; if it happens there again, lower train.lr, otherwise suspect the memory of that rank's device",
            ranks,
        )


def _partitions(engine: Engine[Any, Any]) -> list[Tensor]:
    """This rank's part of the fp32 weights under ZeRO, one flat tensor per parameter group."""
    zero = engine.deepspeed.optimizer
    return list(zero.fp32_partitioned_groups_flat if engine.zero_stage == 3 else zero.single_partition_of_fp32_groups)


def _gather(engine: Engine[Any, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Full fp32 weights and moments on the CPU. Collective: every rank visits the parameters in the same order."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    weights, moments = {}, {}
    for name, parameter in engine.trained.items():
        if engine.zero_stage == 0:
            state = engine.deepspeed.optimizer.state[parameter]
            weight, values = parameter.detach(), {key: state[key] for key in _MOMENTS}
        else:
            weight = safe_get_full_fp32_param(parameter)
            values = {key: safe_get_full_optimizer_state(parameter, key) for key in _MOMENTS}
        weights[name] = weight.cpu().contiguous()
        for key, value in values.items():
            moments[f"{name}.{key}"] = value.cpu().contiguous()
    # Saved tables are buffers, which ZeRO does not shard.
    weights |= {name: table.cpu().contiguous() for name, table in saved_buffers(engine.model).items()}
    return weights, moments


def create_partitioned_state(engine: Engine[Any, Any], step: Tensor) -> None:
    """Create Adam's state in ZeRO's flat partitions before the first optimizer step.

    Adam creates its state lazily in its first step, but DeepSpeed's accessors need it to exist. They look it up only
    once, after the first step of the first parameter group, and so would never find the state of a second group.

    Args:
        step: Adam's step count, a scalar.
    """
    zero = engine.deepspeed.optimizer
    for flat in _partitions(engine):
        zero.optimizer.state[flat] = {"step": step.clone()} | {key: torch.zeros_like(flat) for key in _MOMENTS}
    if engine.zero_stage < 3:
        zero._lazy_init_hp_params_optimizer_state()


def _set_partitioned(engine: Engine[Any, Any], parameter: Any, value: Tensor, key: str) -> None:
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    if engine.zero_stage < 3:
        safe_set_full_optimizer_state(parameter, value, key)
        return
    # ZeRO-3's full setter cannot place a tensor whose size is not a multiple of the number of ranks.
    part = parameter.ds_tensor.numel()
    padded = torch.zeros(part * engine.world.size, dtype=value.dtype, device=value.device)
    padded[: value.numel()] = value.flatten()
    safe_set_local_optimizer_state(parameter, padded[part * engine.world.rank :][:part], key)
