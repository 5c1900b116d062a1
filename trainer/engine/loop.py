"""The training loop: steps, validations, checkpoints, early stopping."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from trainer.config import TrainConfig
from trainer.config.runs import Identity, Progress, RunFolder
from trainer.data.batches import to_device
from trainer.data.loader import Feed, StepBatches
from trainer.data.packing import PackedPrompts
from trainer.data.randomness import torch_seed
from trainer.device import peak_memory_bytes
from trainer.engine.build import Engine, StepReport
from trainer.engine.checkpoint import save
from trainer.engine.meters import Recorder
from trainer.engine.preemption import StopSignals, stop_reason
from trainer.engine.schedule import Schedule, learning_rate
from trainer.engine.vitals import NonFiniteError, Told

log = logging.getLogger(__name__)

Validate = Callable[[], Mapping[str, float]]
StartEpoch = Callable[[], None]


@dataclass(frozen=True)
class Fitted:
    """How far `fit` came."""

    progress: Progress
    stopped: bool
    """It left early for a signal and wants to go on."""


def fit(
    engine: Engine,
    feed: Feed,
    validate: Validate,
    *,
    start_epoch: StartEpoch | None = None,
    schedule: Schedule,
    progress: Progress,
    identity: Identity,
    run: RunFolder,
    stop: StopSignals,
) -> Fitted:
    """Train from `progress` until the schedule ends, patience runs out, or a rank was asked to stop.

    Args:
        start_epoch: called before the first step of each epoch, and not when a run goes on inside one.

    Raises:
        NonFiniteError: the loss or gradient is not finite. The users of the batch are in `RUN/nonfinite.json`; the
            last checkpoint is intact.
    """
    train = engine.train_config
    stopped = None
    clock = time.monotonic()
    told = Told()
    with Recorder(
        run.path, total_steps=schedule.total_steps, done_steps=progress.step, enabled=engine.world.is_main
    ) as recorder:

        def keep() -> None:
            best = progress.best_step == progress.step
            save(engine, run, progress, identity, best=best, keep=train.keep_checkpoints)

        recorder.expect_validations(schedule.validations_after(progress.step))
        if progress.step and schedule.validates(progress.step) and progress.validated_step < progress.step:
            progress = _validate(validate, train, progress, recorder)  # it had stopped between the two
            keep()
        for batches in _steps(feed, schedule, progress.step):
            if schedule.is_over(progress, train.patience):
                break
            if start_epoch and progress.step % schedule.steps_per_epoch == 0:
                start_epoch()
            lr = learning_rate(train, progress)
            told = replace(told, signal=stop.number)
            report = _guarded_step(engine, feed, batches, lr, progress.step, told, run)
            progress = replace(progress, step=progress.step + 1, world_size=engine.world.size)
            now = time.monotonic()
            recorder.step(
                progress.step,
                _scalars(report, batches, lr, now - clock),
                write=progress.step % train.log_every == 0 or progress.step == schedule.total_steps,
            )
            if stopped := stop_reason([rank.signal for rank in report.ranks]):
                keep()
                log.info("stopped by %s after step %d: saved, goes on when started again", stopped, progress.step)
                break
            if schedule.validates(progress.step):
                progress = _validate(validate, train, progress, recorder)
                recorder.expect_validations(schedule.validations_after(progress.step))
                keep()
            elif progress.step % train.save_every == 0:
                keep()
            clock = time.monotonic()
    if progress.stale >= train.patience:
        log.info("stopped early: %d validations without a better %s", progress.stale, train.metric)
    return Fitted(progress, stopped is not None)


def _steps(feed: Feed, schedule: Schedule, done: int) -> Iterator[StepBatches]:
    epoch, first = divmod(done, schedule.steps_per_epoch)
    while True:
        yield from feed.epoch(epoch, first)
        epoch, first = epoch + 1, 0


def _guarded_step(
    engine: Engine, feed: Feed, batches: StepBatches, lr: float, step: int, told: Told, run: RunFolder
) -> StepReport:
    device = engine.world.device
    micro_batches = [to_device(batch, device) for batch in batches.micro_batches]
    seed = torch_seed(feed.seed, 1, step)
    try:
        return engine.step(micro_batches, total_rows=len(batches.user_U), seed=seed, lr=lr, told=told)
    except NonFiniteError as error:
        users = batches.user_U.tolist()
        if engine.world.is_main:
            report = {"step": step + 1, "reason": str(error), "users": users}
            (run.path / "nonfinite.json").write_text(json.dumps(report))
        raise NonFiniteError(
            f"step {step + 1}: {error}; its users are in {run.path / 'nonfinite.json'}. "
            "Lower train.lr or set train.grad_clip, and start again: the last checkpoint is intact"
        ) from error


def _validate(validate: Validate, train: TrainConfig, progress: Progress, recorder: Recorder) -> Progress:
    start = time.monotonic()
    metrics = validate()
    value = metrics[train.metric]
    better = value > progress.best_value
    recorder.validation(progress.step, metrics, better=better, seconds=time.monotonic() - start)
    progress = replace(progress, validations=progress.validations + 1, validated_step=progress.step)
    if better:
        return replace(progress, stale=0, best_step=progress.step, best_value=value)
    return replace(progress, stale=progress.stale + 1)


def _scalars(report: StepReport, batches: StepBatches, lr: float, seconds: float) -> dict[str, float]:
    scalars = {
        "train/loss": report.loss,
        **{f"train/{name}": value for name, value in report.parts.items()},
        "train/lr": lr,
        "train/grad_norm": report.grad_norm,
        "speed/users_per_second": len(batches.user_U) / seconds,
        "memory/peak_gib": peak_memory_bytes() / 2**30,
    }
    packed = [found for batch in batches.micro_batches if (found := _packed(batch)) is not None]
    if packed:
        useful = sum(prompts.useful_tokens for prompts in packed)
        own_users = sum(len(batch.user_B) for batch in batches.micro_batches)
        # This rank's tokens a user stand for every rank's.
        scalars["speed/useful_tokens_per_second"] = useful / max(own_users, 1) * len(batches.user_U) / seconds
        scalars["speed/tokens_run_share"] = sum(prompts.run_tokens for prompts in packed) / max(useful, 1)
    return scalars


def _packed(batch: Any) -> PackedPrompts | None:
    prompts = getattr(batch, "prompts", None)
    return prompts if isinstance(prompts, PackedPrompts) else None
