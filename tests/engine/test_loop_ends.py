"""However training ends, no thread goes on building batches."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from trainer.config import TrainConfig
from trainer.data.collators.sequences import SequenceCollator
from trainer.data.loader import StepLoader
from trainer.data.reading.dataset import open_dataset
from trainer.data.reading.histories import Users
from trainer.distributed import World
from trainer.engine import loop
from trainer.engine.engine import StepReport
from trainer.engine.loop import FitResult, fit
from trainer.engine.preemption import StopSignals
from trainer.engine.rank_status import RankStatus
from trainer.engine.schedule import Schedule
from trainer.runs.folder import Identity, Progress, RunFolder


class Engine:
    """What `fit` uses of an engine; its third step ends as `ending` says. Not the main rank, which writes files."""

    world = World(1, 2, torch.device("cpu"))

    def __init__(self, ending: str) -> None:
        self.ending = ending
        self.steps = 0
        self.train_config = TrainConfig(
            batch_size=20, epochs=9, max_steps=5 if ending == "max_steps" else None, patience=2, validate_every=0.25
        )

    def step(self, batches: Any, *, status: RankStatus, **options: Any) -> StepReport:
        self.steps += 1
        if self.steps == 3:
            match self.ending:
                case "error":
                    raise RuntimeError("the device is gone")
                case "ctrl-c":
                    raise KeyboardInterrupt
                case "signal":
                    status = RankStatus(signal.SIGTERM, 0.0, False)
        return StepReport(1.0, {}, 1.0, (status, status), 0.0)


class Failing:
    """A collator that cannot build its third batch."""

    def __init__(self, collator: SequenceCollator) -> None:
        self.collator, self.calls = collator, 0
        self.max_history = collator.max_history

    def train(self, users: Users, share: slice, epoch: int) -> Any:
        self.calls += 1
        if self.calls == 3:
            raise ValueError("a user has too few items: ask for fewer negatives")
        return self.collator.train(users, share, epoch)


def train(ending: str, world: Path, tmp_path: Path) -> tuple[FitResult, Engine]:
    dataset = open_dataset(world, full_check=False)
    collator: Any = SequenceCollator(dataset.num_items, max_history=12, negatives=2, fixed_length=False, seed=5)
    collator = Failing(collator) if ending == "collator" else collator
    engine = Engine(ending)
    values = iter([0.5, 0.4, 0.3] if ending == "patience" else range(99))
    loader = StepLoader(
        dataset, collator, 20, 1, shuffle_shards=2, seed=5, workers=0, rank=1, world_size=2
    )  # fmt: skip
    found: FitResult = fit(
        cast(Any, engine),
        loader,
        lambda: {"HR@10": float(next(values))},
        schedule=Schedule.of(engine.train_config, 61),
        progress=Progress(),
        identity=Identity("", "", "", ""),
        run=RunFolder(tmp_path),
        stop=StopSignals(),
    )
    return found, engine


@pytest.fixture(autouse=True)
def nothing_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "save", lambda *_, **__: True)


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


@pytest.mark.parametrize(
    ("ending", "steps", "stopped"), [("max_steps", 5, False), ("patience", 3, False), ("signal", 3, True)]
)
def test_a_run_that_ends(ending: str, steps: int, stopped: bool, world: Path, tmp_path: Path) -> None:
    result, engine = train(ending, world, tmp_path)
    assert (engine.steps, result.progress.step, result.stopped) == (steps, steps, stopped)
    assert not threads()


@pytest.mark.parametrize(
    ("ending", "error", "steps"),
    [("error", RuntimeError, 3), ("ctrl-c", KeyboardInterrupt, 3), ("collator", ValueError, 2)],
)
def test_a_run_that_fails(ending: str, error: type[BaseException], steps: int, world: Path, tmp_path: Path) -> None:
    """Asserted while the error is being handled, when its traceback still refers to all of the loop."""
    with pytest.raises(error) as raised:
        train(ending, world, tmp_path)
    assert not threads(), raised.value
