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
from pathlib import Path
from typing import Any

from trainer.config import parse_config
from trainer.data.loader import StepBatches
from trainer.distributed import World, start, stop
from trainer.engine.loop import fit
from trainer.engine.preemption import StopSignals
from trainer.engine.schedule import Schedule
from trainer.evaluation.protocol import Evaluator
from trainer.nn.module import Module
from trainer.runs.preflight import preflight
from trainer.workflows.setup import set_up


class KilledError(Exception):
    """Simulates the death of the process."""


class RecordingLoader:
    """Wraps the real loader: records the users of each step and can end the run."""

    def __init__(self, loader: Any, interrupt: int | None, done: int) -> None:
        self._loader, self._left = loader, None if interrupt is None else interrupt - done
        self.seed = loader.seed
        self.users: list[list[int]] = []
        self.own: list[list[int]] = []

    def steps(self, first: int, total: int) -> Iterator[StepBatches[Any]]:
        for batches in self._loader.steps(first, total):
            if self._left is not None and len(self.users) == self._left:
                raise KilledError
            self.users.append(batches.user_U.tolist())
            self.own.append([int(u) for batch in batches.micro_batches for u in batch.user_B])
            yield batches


def digests(model: Module) -> dict[str, str]:
    """sha256 of each frozen parameter's bytes."""
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    return {name: hashlib.sha256(p.detach().numpy().tobytes()).hexdigest() for name, p in frozen.items()}


def run(scenario: dict[str, Any], world: World) -> dict[str, Any]:
    config = parse_config(scenario["config"], scenario["name"])
    if world.is_main and "copy_from" in scenario:
        shutil.copytree(scenario["copy_from"], config.output)
    world.barrier()
    setup = set_up(preflight(config, world.size), world)
    loader = RecordingLoader(setup.loader, scenario.get("interrupt"), setup.progress.step)
    evaluator = Evaluator(setup.dataset, setup.system.scoring, config.evaluation, world, config.task)
    reports: list[tuple[float, float]] = []
    step = setup.engine.step

    def recording_step(*args: Any, **kwargs: Any) -> Any:
        report = step(*args, **kwargs)
        reports.append((report.loss, report.grad_norm))
        return report

    setup.engine.step = recording_step  # type: ignore[method-assign]

    def validate() -> dict[str, float]:
        setup.engine.model.eval()
        return evaluator.validate()

    def start_epoch() -> None:
        if setup.system.epoch_items:
            setup.engine.model.eval()
            evaluator.refresh(setup.system.epoch_items)

    try:
        fit(
            setup.engine, loader, validate, start_epoch=start_epoch,  # type: ignore[arg-type]  # has what `fit` uses
            schedule=Schedule.of(config.train, setup.dataset.manifest.num_users),
            progress=setup.progress, identity=setup.identity, run=setup.run, stop=StopSignals(),
        )  # fmt: skip
    except KilledError:
        if world.is_main and scenario.get("tear"):
            # What a kill in the middle of a save leaves behind.
            (setup.run.checkpoints / ".writing-step-00000099").mkdir()
    return {
        "name": scenario["name"],
        "start": setup.progress.step,
        "losses": [loss for loss, _ in reports],
        "grad_norms": [norm for _, norm in reports],
        "users": loader.users,
        "own": loader.own,
        "frozen": digests(setup.system.model) if setup.engine.zero_stage < 3 else {},
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
