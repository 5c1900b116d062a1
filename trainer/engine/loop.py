"""The training loop: steps, validations, checkpoints, early stopping."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Generic, NamedTuple, TypeVar

from trainer.config import TrainConfig
from trainer.data.collators.base import to_device
from trainer.data.loader import StepBatches, StepLoader
from trainer.data.prompts.packing import PackedPrompts
from trainer.data.reading.counter_rng import torch_seed
from trainer.device import HeapTrimmer, memory_gib
from trainer.engine.checkpoint import repair_best, save
from trainer.engine.engine import Engine, StepReport
from trainer.engine.preemption import Stopped, StopSignals, stop_reason
from trainer.engine.rank_status import NonFiniteError, RankStatus
from trainer.engine.recording.recorder import Recorder
from trainer.engine.schedule import SaveClock, Schedule, learning_rate
from trainer.engine.stragglers import Stragglers
from trainer.runs.folder import Identity, Progress, RunFolder

log = logging.getLogger(__name__)

BatchT = TypeVar("BatchT")
TermsT = TypeVar("TermsT", bound=NamedTuple)

Validate = Callable[[], Mapping[str, float]]
Samples = Callable[[], str]
StartEpoch = Callable[[], None]
RestoreFolder = Callable[[], bool]


@dataclass(frozen=True)
class FitResult:
    """Where and how `fit` ended."""

    progress: Progress
    stopped: bool
    """A signal stopped it early; the run resumes when started again."""


def fit(
    engine: Engine[BatchT, TermsT],
    loader: StepLoader[BatchT],
    validate: Validate,
    *,
    samples: Samples | None = None,
    start_epoch: StartEpoch | None = None,
    restore_folder: RestoreFolder | None = None,
    schedule: Schedule,
    progress: Progress,
    identity: Identity,
    run: RunFolder,
    stop: StopSignals,
) -> FitResult:
    """Train from `progress` until the schedule ends, patience runs out, or a rank was asked to stop.

    Args:
        validate: returns each metric's value. It may raise `Stopped`, as may `start_epoch`, and is then called again
            when the run resumes.
        samples: called after each validation, on every rank: answers to a few users, in markdown, for TensorBoard.
        start_epoch: called before the first step of each epoch, but not when a run resumes mid-epoch.
        restore_folder: called on rank 0 before each checkpoint: makes the run folder again if it was removed, and
            returns whether it was.

    Raises:
        NonFiniteError: the loss or gradient is not finite. The users of the batch are in `RUN/nonfinite.json`; the
            last checkpoint is intact.
        OSError: the last checkpoint of the run could not be written.
    """
    total, done = schedule.total_steps, progress.step
    with Recorder(run, total_steps=total, done_steps=done, enabled=engine.world.is_main) as recorder:
        loop = _Loop(
            engine, validate, samples, start_epoch, restore_folder, schedule, identity, run, stop, recorder, progress
        )
        return loop.run(loader)


class _Loop(Generic[BatchT, TermsT]):
    """State of `fit` between steps."""

    def __init__(
        self,
        engine: Engine[BatchT, TermsT],
        validate: Validate,
        samples: Samples | None,
        start_epoch: StartEpoch | None,
        restore_folder: RestoreFolder | None,
        schedule: Schedule,
        identity: Identity,
        run: RunFolder,
        stop: StopSignals,
        recorder: Recorder,
        progress: Progress,
    ) -> None:
        self._engine, self._validate, self._samples, self._start_epoch = engine, validate, samples, start_epoch
        self._restore_folder = restore_folder
        self._schedule, self._identity = schedule, identity
        self._run, self._stop, self._recorder = run, stop, recorder
        self._train = engine.train_config
        self._heartbeat = engine.world.heartbeat
        self._progress = replace(progress, started=progress.started or time.time())
        self._saved = True
        self._stragglers = Stragglers()
        self._save_clock = SaveClock(self._train.save_minutes)
        self._save_due = False
        self._busy_seconds = self._step_seconds = 0.0
        self._trimmer = HeapTrimmer() if engine.world.device.type == "cpu" else None

    def run(self, loader: StepLoader[BatchT]) -> FitResult:
        """Train until the run ends or is stopped."""
        self._recorder.expect_validations(self._schedule.validations_after(self._progress.step))
        if self._engine.world.is_main:
            repair_best(self._run, self._progress.best_step)
        try:
            self._train_on(loader)
        except Stopped as asked:
            step, phase = self._progress.step, self._heartbeat.phase
            if step:
                self._keep_folder()
                self._save(best=False)
            where = {"validate": ", during validation", "epoch": ", before the next epoch"}.get(phase, "")
            log.info("stopped by %s after step %d%s; resumes when started again", asked, step, where)
            return FitResult(self._progress, stopped=True)
        if not self._saved:
            raise OSError(
                f"{self._run.checkpoints} has no checkpoint of the last step: free disk space there and start it again"
            )
        if self._progress.stale >= self._train.patience:
            log.info("stopped early: %d validations without a better %s", self._progress.stale, self._train.metric)
        return FitResult(self._progress, stopped=False)

    def _train_on(self, loader: StepLoader[BatchT]) -> None:
        """Run steps and validations until the schedule ends.

        Raises:
            Stopped: a rank was asked to stop. A checkpoint saved now resumes from the last step and repeats what
                follows it.
        """
        done = self._progress
        if self._schedule.validates(done.step) and done.validated_step < done.step:
            self._validate_and_save()  # the run was stopped after this step, before its validation
        # Closed however training ends, so that no thread keeps building batches.
        with closing(loader.steps(self._progress.step, self._schedule.total_steps)) as batches:
            while not self._schedule.is_over(self._progress, self._train.patience):
                self._step(loader.seed, batches)
                self._validate_and_save()

    def _step(self, seed: int, steps: Iterator[StepBatches[BatchT]]) -> None:
        """Run one training step and report it.

        Raises:
            Stopped: a rank was asked to stop; the step itself is complete.
        """
        done = self._progress.step
        if self._start_epoch and done % self._schedule.steps_per_epoch == 0:
            self._heartbeat.at("epoch", done + 1)
            self._start_epoch()
        start = time.monotonic()
        self._heartbeat.at("data", done + 1)
        batches = next(steps)
        data_seconds = time.monotonic() - start
        lr = learning_rate(self._train, self._progress)
        status = RankStatus(self._stop.number, self._busy_seconds, self._save_clock.due(self._step_seconds))
        report = _guarded_step(self._engine, seed, batches, lr, done, status, self._run)
        self._busy_seconds = data_seconds + report.forward_seconds
        self._save_due = report.ranks[0].save_due  # clocks differ and saving is collective: rank 0 decides
        if self._trimmer:
            self._trimmer.after_step()
        self._step_seconds = seconds = time.monotonic() - start
        self._progress = replace(
            self._progress,
            step=done + 1,
            useful_seconds=self._progress.useful_seconds + seconds,
            world_size=self._engine.world.size,
        )
        if warning := self._stragglers.add([rank.busy_seconds for rank in report.ranks], seconds):
            log.warning(warning)
        goodput = self._progress.useful_seconds / max(time.time() - self._progress.started, 1e-9)
        self._recorder.step(
            done + 1,
            _scalars(report, batches, lr, seconds) | {"speed/goodput": goodput},
            write=(done + 1) % self._train.log_every == 0 or done + 1 == self._schedule.total_steps,
        )
        if reason := stop_reason([rank.signal for rank in report.ranks]):
            raise Stopped(reason)

    def _validate_and_save(self) -> None:
        """Validate and save if due after the step."""
        step = self._progress.step
        if self._schedule.validates(step):
            self._heartbeat.at("validate")
            start = time.monotonic()
            metrics = self._validate()
            samples = self._samples() if self._samples else ""
            seconds = time.monotonic() - start
            self._keep_folder()
            before = self._progress
            self._progress = _validated(metrics, samples, seconds, self._train, before, self._recorder)
            self._recorder.expect_validations(self._schedule.validations_after(step))
            better = self._progress.best_step == step
            self._save(best=better)
            if better and not self._saved:  # the best checkpoint on disk is still the previous one
                self._progress = replace(self._progress, best_step=before.best_step, best_value=before.best_value)
        elif self._save_due or (self._train.save_every and step % self._train.save_every == 0):
            self._keep_folder()
            self._save(best=False)
        else:
            return
        if not self._saved:
            self._keep_folder()  # it may have been removed, or its file system unmounted, meanwhile

    def _keep_folder(self) -> None:
        """Use a new run folder if the old one was removed: the best checkpoint is then the next that validates."""
        if self._restore_folder is None:
            return
        removed = self._engine.world.is_main and self._restore_folder()
        if self._engine.world.broadcast_value(removed):
            self._recorder.reopen(self._progress.step)
            self._progress = replace(self._progress, stale=0, best_step=0, best_value=float("-inf"))

    def _save(self, *, best: bool) -> None:
        self._heartbeat.at("save")
        keep = self._train.keep_checkpoints
        self._saved = save(self._engine, self._run, self._progress, self._identity, best=best, keep=keep)
        self._save_clock.restart()


def _guarded_step(
    engine: Engine[BatchT, TermsT],
    seed: int,
    batches: StepBatches[BatchT],
    lr: float,
    step: int,
    status: RankStatus,
    run: RunFolder,
) -> StepReport:
    """Run `engine.step`; if it is not finite, write the batch's users to `nonfinite.json`."""
    device = engine.world.device
    micro_batches = [to_device(batch, device) for batch in batches.micro_batches]
    try:
        return engine.step(
            micro_batches,
            total_rows=len(batches.user_U),
            seed=torch_seed(seed, 1, step),
            lr=lr,
            status=status,
            keep_fixed=batches.easy,
        )
    except NonFiniteError as error:
        users = batches.user_U.tolist()
        if engine.world.is_main:
            report = {"step": step + 1, "reason": str(error), "users": users}
            (run.path / "nonfinite.json").write_text(json.dumps(report))
        cure = _cure(engine.train_config, run, error.ranks)
        raise NonFiniteError(
            f"step {step + 1}: {error}; its users are in {run.path / 'nonfinite.json'}. {cure}", error.ranks
        ) from error


def _cure(train: TrainConfig, run: RunFolder, ranks: Sequence[int]) -> str:
    """What to do about a loss that is not finite. The same settings would meet it again, at the same step, unless the
    memory of a device is at fault."""
    again = "If it is not there when the same command is run again, suspect that rank's device; if it is, lower"
    lower = again if ranks else "Lower"
    change = f"{lower} train.lr (it is {train.lr:g}) or set train.grad_clip (it is {train.grad_clip:g})"
    if not run.steps():  # so no checkpoint holds the folder to its settings
        return f"{change}, and start again"
    return (
        f"{change}, and choose another output, or remove {run.path} first: its checkpoints, up to step "
        f"{run.steps()[-1]}, only resume with the settings that they were trained with"
    )


def _validated(
    metrics: Mapping[str, float],
    samples: str,
    seconds: float,
    train: TrainConfig,
    progress: Progress,
    recorder: Recorder,
) -> Progress:
    value = metrics[train.metric]
    better = value > progress.best_value
    recorder.validation(progress.step, metrics, chosen=train.metric, better=better, seconds=seconds, samples=samples)
    progress = replace(progress, validations=progress.validations + 1, validated_step=progress.step)
    if better:
        return replace(progress, stale=0, best_step=progress.step, best_value=value)
    return replace(progress, stale=progress.stale + 1)


def _scalars(report: StepReport, batches: StepBatches[BatchT], lr: float, seconds: float) -> dict[str, float]:
    scalars = {
        "train/loss": report.loss,
        **{f"train/{name}": value for name, value in report.parts.items()},
        "train/lr": lr,
        "train/grad_norm": report.grad_norm,
        "speed/users_per_second": len(batches.user_U) / seconds,
        **{f"memory/{name}_gib": value for name, value in memory_gib().items()},
    }
    packed = [found for batch in batches.micro_batches if (found := _packed(batch)) is not None]
    if packed:
        useful = sum(prompts.useful_tokens for prompts in packed)
        # This rank's tokens per user stand in for all ranks': the exact count would need a collective.
        per_user = useful / max(batches.own_users, 1)
        scalars["speed/useful_tokens_per_second"] = per_user * len(batches.user_U) / seconds
        scalars["speed/tokens_run_share"] = sum(prompts.run_tokens for prompts in packed) / max(useful, 1)
    return scalars


def _packed(batch: object) -> PackedPrompts | None:
    prompts = getattr(batch, "prompts", None)
    return prompts if isinstance(prompts, PackedPrompts) else None
