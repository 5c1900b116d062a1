"""One rank of the distributed tests: runs a list of scenarios (JSON) one after another in one process group.

A scenario is a configuration and optionally `interrupt`, a step after which the run dies as if killed.
Writes, on rank 0, the losses, gradient norms and sample ids of each scenario to the file named by `report`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from trainer.config import parse_config
from trainer.data.loader import StepBatches
from trainer.distributed import start, stop
from trainer.engine.loop import fit
from trainer.engine.preemption import StopSignals
from trainer.engine.schedule import Schedule
from trainer.evaluation.protocol import Evaluator
from trainer.workflows.setup import prepare


class KilledError(Exception):
    """Stands for the end of a process."""


class RecordingFeed:
    """The real feed, which notes the users of each step and can end the run."""

    def __init__(self, loader: Any, interrupt: int | None, done: int) -> None:
        self._loader, self._left = loader, None if interrupt is None else interrupt - done
        self.seed = loader.seed
        self.users: list[list[int]] = []
        self.own: list[list[int]] = []

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[StepBatches]:
        for batches in self._loader.epoch(epoch, first_step):
            if self._left is not None and len(self.users) == self._left:
                raise KilledError
            self.users.append(batches.user_U.tolist())
            self.own.append([int(u) for batch in batches.micro_batches for u in batch.user_B])
            yield batches


def digests(model: nn.Module) -> dict[str, str]:
    """sha256 of each frozen parameter's bytes."""
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    return {name: hashlib.sha256(p.detach().numpy().tobytes()).hexdigest() for name, p in frozen.items()}


def run(scenario: dict[str, Any], world: Any) -> dict[str, Any]:
    config = parse_config(scenario["config"], scenario["name"])
    if world.is_main and "copy_from" in scenario:
        shutil.copytree(scenario["copy_from"], config.output)
    world.barrier()
    job = prepare(config, world)
    loader = RecordingFeed(job.loader, scenario.get("interrupt"), job.progress.step)
    evaluator = Evaluator(job.dataset, job.system.collator, config.evaluation, world, config.task)
    reports: list[tuple[float, float]] = []
    step = job.engine.step

    def recording_step(*args: Any, **kwargs: Any) -> Any:
        report = step(*args, **kwargs)
        reports.append((report.loss, report.grad_norm))
        return report

    job.engine.step = recording_step  # type: ignore[method-assign]

    def validate() -> dict[str, float]:
        job.engine.model.eval()
        return evaluator.validate(job.engine.model)

    try:
        fit(
            job.engine, loader, validate, start_epoch=partial(evaluator.refresh, job.system),  # type: ignore[arg-type]
            schedule=Schedule.of(config.train, job.dataset.manifest.num_users),
            progress=job.progress, identity=job.identity, run=job.run, stop=StopSignals(),
        )  # fmt: skip
    except KilledError:
        if world.is_main and scenario.get("tear"):
            # What a kill in the middle of a save leaves behind.
            (job.run.checkpoints / ".writing-step-00000099").mkdir()
    return {
        "name": scenario["name"],
        "start": job.progress.step,
        "losses": [loss for loss, _ in reports],
        "grad_norms": [norm for _, norm in reports],
        "users": loader.users,
        "own": loader.own,
        "frozen": digests(job.system.model) if job.engine.zero_stage < 3 else {},
        "valid": validate() if "interrupt" not in scenario else {},
    }


def main() -> None:
    scenarios, report = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    world = start(threads=1)
    try:
        results = [run(scenario, world) for scenario in scenarios]
    finally:
        stop()
    report.with_suffix(f".{world.rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
    os._exit(0)  # as launchers do: threads of the collective library may wait for a rank that has left
