"""Train any system: `deepspeed launchers/train.py PRESET.yaml section.key=value ...`.

Also runs as plain `python launchers/train.py ...` in one process, and under any launcher that sets RANK, WORLD_SIZE
and LOCAL_RANK. Started again with the same output, it goes on where it stopped. SIGUSR1 and SIGTERM make it save and
leave with exit code 0 and the file RUN/requeue.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from launchers.command import leave, run_command
from trainer.config import RunConfig, built_on, load_config
from trainer.engine.preemption import Stopped, StopSignals, stop_together
from trainer.runs.folder import RunFolder
from trainer.runs.launch_env import ranks_started
from trainer.runs.preflight import check_door

if TYPE_CHECKING:
    from trainer.distributed import World


def main(arguments: Sequence[str]) -> None:
    """Train, then test the best checkpoint and print the table."""
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__.split("\n")[0])
    parser.add_argument("preset", type=Path, help="YAML file, for example trainer/presets/sasrec.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the preset")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    options = parser.parse_args(arguments)
    # Checked before torch is imported: a mistyped key costs a tenth of a second, not half a minute.
    config = load_config(options.preset, options.overrides)
    if os.environ.get("RANK", "0") == "0" and config.output.is_dir():
        RunFolder(config.output).requeue.unlink(missing_ok=True)
    check_door(config, ranks_started())
    signals = StopSignals()
    signals.install()

    from trainer.distributed import start, stop
    from trainer.engine.watchdog import Watchdog

    world = start(config.engine.threads, patience=timedelta(seconds=20 * config.engine.timeout))
    with Watchdog(world, RunFolder(config.output), config.engine.timeout):
        _train(config, world, signals)
    stop()
    signals.ignore()


def _train(config: RunConfig, world: World, signals: StopSignals) -> None:
    import logging

    from trainer.engine.loop import fit
    from trainer.engine.metrics import log_to
    from trainer.engine.rank_status import NonFiniteError
    from trainer.engine.schedule import Schedule
    from trainer.evaluation.protocol import Evaluator
    from trainer.workflows.evaluate_run import print_results, test_best
    from trainer.workflows.setup import prepare

    if not world.is_main:
        log_to(None)
    job = prepare(config, world)
    log_to(config.output / "log.txt" if world.is_main else None)
    log = logging.getLogger("trainer.train")
    schedule = Schedule.of(config.train, job.dataset.manifest.num_users)
    trained = sum(p.numel() for p in job.system.model.parameters() if p.requires_grad)
    log.info(
        "%s on %s: %s users, %s items, %s trained parameters, %d rank(s), %d steps of %d users",
        config.system.name, job.dataset.manifest.name, f"{job.dataset.manifest.num_users:,}",
        f"{job.dataset.num_items:,}", f"{trained:,}", world.size, schedule.total_steps, config.train.batch_size,
    )  # fmt: skip
    if job.progress.step:
        log.info("going on from step %d", job.progress.step)
    between = partial(stop_together, world, signals)
    evaluator = Evaluator(job.dataset, job.system.collator, config.evaluation, world, config.task, between)

    def validate() -> dict[str, float]:
        job.engine.model.eval()
        return evaluator.validate(job.engine.model)

    try:
        fitted = fit(
            job.engine, job.feed, validate, start_epoch=partial(evaluator.refresh, job.system),
            schedule=schedule, progress=job.progress, identity=job.identity, run=job.run, stop=signals,
        )  # fmt: skip
    except NonFiniteError as error:
        raise ValueError(str(error)) from error  # the user's to mend, so told in one line
    stopped = fitted.stopped
    if not stopped:
        world.heartbeat.at("test")
        try:
            test_best(config, evaluator, job.engine, job.run)
        except Stopped as asked:
            log.info("stopped by %s in the test; goes on when started again", asked)
            stopped = True
    if stopped:
        if world.is_main:
            job.run.requeue.touch()
        world.barrier()
    elif world.is_main:
        print_results([*built_on(config.system).values(), config.output], config.evaluation)


if __name__ == "__main__":
    leave(run_command(main))
