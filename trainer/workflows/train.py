"""Train a checked run to its end, then test its best checkpoint."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import partial

from trainer.config import RunConfig, built_on
from trainer.device import describe_software, use_deterministic_algorithms
from trainer.distributed import World, start
from trainer.engine.loop import fit
from trainer.engine.preemption import Stopped, StopSignals, stop_together
from trainer.engine.rank_status import NonFiniteError
from trainer.engine.recording.recorder import log_to
from trainer.engine.schedule import Schedule
from trainer.engine.watchdog import Watchdog
from trainer.evaluation.protocol import Evaluator
from trainer.runs.folder import RunFolder
from trainer.runs.lock import RunLock
from trainer.runs.preflight import Preflight
from trainer.workflows.board import Validation
from trainer.workflows.evaluate_run import print_results, test_best
from trainer.workflows.setup import TrainingSetup, raise_on_all_ranks, set_up

log = logging.getLogger("trainer.train")

_COLLECTIVE_PATIENCE = 20
"""Time-out of collectives, in multiples of `engine.timeout`; long, so that the watchdog ends a stuck run first."""


def train(checked: Preflight, signals: StopSignals | None = None) -> bool:
    """Train or resume a run, test its best checkpoint, and print its results and those of the runs that it builds on.

    Every rank of the run calls it. The process group stays open, so that a process can train several runs in turn;
    `trainer.distributed.stop` closes it.

    Args:
        checked: the run, from `preflight`.
        signals: where stop signals are noted; None: no signal stops the run.

    Returns:
        Whether the run ended. False: it was stopped by a signal, is saved, and resumes when started again.

    Raises:
        KeyboardInterrupt: it was stopped by Ctrl-C, and is saved.
        ValueError: the run cannot start, its loss or gradient is not finite, or its dataset was replaced.
        OSError: its last checkpoint could not be written.
    """
    config = checked.config
    signals = signals or StopSignals()
    if config.engine.deterministic:
        use_deterministic_algorithms()
    world = start(config.engine.threads, timeout=timedelta(seconds=_COLLECTIVE_PATIENCE * config.engine.timeout))
    run = RunFolder(config.output)
    # The lock comes first, because the watchdog writes to the run folder.
    with _locked(run, world) as lock, Watchdog(world, run, config.engine.timeout):
        return _train(checked, world, signals, lock)


@contextmanager
def _locked(run: RunFolder, world: World) -> Iterator[RunLock]:
    """Hold the run folder; rank 0 does, which alone writes checkpoints.

    Raises:
        ValueError: another process trains in it; on every rank.
    """
    lock = RunLock(run)
    with ExitStack() as stack:
        try:
            if world.is_main:
                stack.enter_context(lock)
        except (ValueError, OSError) as error:
            raise_on_all_ranks(world, str(error))
            raise
        raise_on_all_ranks(world, None)
        yield lock


def _train(checked: Preflight, world: World, signals: StopSignals, lock: RunLock) -> bool:
    if not world.is_main:
        log_to(None)
    setup = set_up(checked, world)
    config = setup.config
    log_to(setup.run.log if world.is_main else None)
    schedule = Schedule.of(config.train, setup.dataset.manifest.num_train_users)
    _log_start(setup, world, schedule)
    between = partial(stop_together, world, signals)
    evaluator = Evaluator(setup.dataset, setup.system.scoring, config.evaluation, world, config.task, between)
    validation = Validation(evaluator)
    with signals.noting_interrupts():
        try:
            fitted = fit(
                setup.engine,
                setup.loader,
                partial(_validate, setup, validation),
                samples=validation.samples,
                start_epoch=partial(_refresh, setup, evaluator),
                restore_folder=partial(_restore_folder, setup, lock),
                schedule=schedule,
                progress=setup.progress,
                identity=setup.identity,
                run=setup.run,
                stop=signals,
            )
        except NonFiniteError as error:
            raise ValueError(str(error)) from error  # for the user to fix, so reported in one line
        ended = not fitted.stopped and _test(config, setup, evaluator, world)
    if not ended:
        if signal.SIGINT in world.all_gather_value(signals.number):
            raise KeyboardInterrupt
        if world.is_main:
            setup.run.requeue.touch()
        world.barrier()
    elif world.is_main:
        print_results([*built_on(config.system).values(), config.output], config.evaluation)
    return ended


def _log_start(setup: TrainingSetup, world: World, schedule: Schedule) -> None:
    config, manifest = setup.config, setup.dataset.manifest
    trained = sum(p.numel() for p in setup.system.model.parameters() if p.requires_grad)
    log.info(
        "%s on %s: %s users, %s items, %s trained parameters, %d rank(s), %d steps of %d users",
        config.system.name, manifest.name, f"{manifest.num_users:,}", f"{manifest.num_items:,}", f"{trained:,}",
        world.size, schedule.total_steps, config.train.batch_size,
    )  # fmt: skip
    log.info("device: %s", describe_software())
    cores, ranks_here = len(os.sched_getaffinity(0)), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if world.device.type == "cpu" and ranks_here > cores:
        log.warning("%d ranks share %d cores: start at most %d, more are slower", ranks_here, cores, cores)
    if setup.carried:
        log.info("%s", setup.carried.summary())
        if not setup.carried.teacher_follows:
            log.warning(
                "the teacher is not the one of %s and was not started from it: its vectors mean something else to the "
                "weights that were carried over; train the teacher with train.init_from too",
                setup.carried.init_from,
            )
    if setup.progress.step:
        log.info("resuming from step %d", setup.progress.step)


def _restore_folder(setup: TrainingSetup, lock: RunLock) -> bool:
    """Make the run folder again if it was removed, so that what is saved from now on can be opened; whether it was.

    Raises:
        ValueError: another process trains there by now.
    """
    if not lock.taken_again():
        return False
    setup.run.write_config(setup.config)
    log_to(setup.run.log)
    log.warning("%s was removed while it trained: it is made again, without its checkpoints so far", setup.run.path)
    return True


def _validate(setup: TrainingSetup, validation: Validation) -> dict[str, float]:
    setup.engine.model.eval()
    return validation.metrics()


def _refresh(setup: TrainingSetup, evaluator: Evaluator) -> None:
    """Recompute the item vectors that are kept for an epoch, if the system has any."""
    if setup.system.epoch_items:
        setup.engine.model.eval()
        evaluator.refresh(setup.system.epoch_items)


def _test(config: RunConfig, setup: TrainingSetup, evaluator: Evaluator, world: World) -> bool:
    """Test the best checkpoint; False if a signal stopped it."""
    world.heartbeat.at("test")
    try:
        test_best(config, evaluator, setup.engine, setup.run)
    except Stopped as asked:
        log.info("stopped by %s during the test; resumes when started again", asked)
        return False
    return True
