"""Engine parts that need no process group: DeepSpeed's JSON, the schedule, the clocks."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path

import pytest

from trainer.config import ConfigError, TrainConfig
from trainer.config.deepspeed_json import CONFIGS, load_deepspeed_json, zero_stage
from trainer.engine.recording.recorder import Clock
from trainer.engine.schedule import SaveClock, Schedule, learning_rate
from trainer.runs.folder import Progress


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_every_shipped_configuration_loads(path: Path) -> None:
    settings = load_deepspeed_json(path.stem, TrainConfig(grad_clip=2.0), micro_batches=3)
    assert zero_stage(settings) == int(path.stem.removeprefix("zero"))
    assert (settings["gradient_accumulation_steps"], settings["gradient_clipping"]) == (3, 2.0)
    assert load_deepspeed_json(str(path), TrainConfig(), micro_batches=1)["zero_optimization"]


def test_a_deepspeed_file_cannot_set_what_the_run_configuration_sets(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"optimizer": {"type": "Adam"}}))
    with pytest.raises(ConfigError, match=r"mine\.json sets 'optimizer': remove it there and use train\.lr"):
        load_deepspeed_json(str(file), TrainConfig(), micro_batches=1)
    file.write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        load_deepspeed_json(str(file), TrainConfig(), micro_batches=1)
    with pytest.raises(ConfigError, match=r"engine\.deepspeed=zero9: no such file .*zero1"):
        load_deepspeed_json("zero9", TrainConfig(), micro_batches=1)


def _validations(schedule: Schedule) -> list[int]:
    return [step for step in range(1, schedule.total_steps + 1) if schedule.validates(step)]


def test_validations_are_spread_over_the_epoch_and_end_the_run() -> None:
    schedule = Schedule.of(TrainConfig(epochs=2, batch_size=20, validate_every=0.1), num_train_users=943)
    assert (schedule.steps_per_epoch, schedule.total_steps) == (48, 96)
    steps = _validations(schedule)
    assert len(steps) == 20
    assert {48, 96} <= set(steps)
    assert max(b - a for a, b in itertools.pairwise(steps)) <= 5


def test_fewer_than_ten_steps_per_epoch_validate_after_each() -> None:
    """The official code divides by zero here."""
    assert _validations(Schedule.of(TrainConfig(epochs=1, batch_size=20), num_train_users=60)) == [1, 2, 3]


def test_a_run_cut_short_still_ends_with_a_validation() -> None:
    schedule = Schedule.of(TrainConfig(epochs=9, max_steps=7, batch_size=10, validate_every=0.5), num_train_users=100)
    assert schedule.total_steps == 7
    assert _validations(schedule) == [5, 7]
    for step in range(8):
        assert schedule.validations_after(step) == len([v for v in (5, 7) if v > step])


def test_the_learning_rate_warms_up_and_decays_as_a_function_of_progress() -> None:
    train = TrainConfig(lr=0.1, lr_decay=0.5, warmup_steps=4)
    rates = [learning_rate(train, Progress(step=step)) for step in range(6)]
    assert rates == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.1])
    assert learning_rate(train, Progress(step=1, validations=2)) == pytest.approx(0.05 / 4)
    assert learning_rate(TrainConfig(lr=0.1, lr_decay=0.5), Progress(step=0)) == 0.1


def test_linear_decay_follows_the_warm_up_and_reaches_0_after_the_last_step() -> None:
    train = TrainConfig(lr=0.1, lr_decay=1.0, warmup_steps=2, decay_steps=6)
    rates = [learning_rate(train, Progress(step=step)) for step in range(8)]
    assert rates == pytest.approx([0.05, 0.1, 0.1, 0.075, 0.05, 0.025, 0.0, 0.0])
    late = [learning_rate(train.model_copy(update={"decay_from": 4}), Progress(step=step)) for step in range(8)]
    assert late == pytest.approx([0.05, 0.1, 0.1, 0.1, 0.1, 0.05, 0.0, 0.0])


def test_the_clock_counts_validations(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    clock = Clock(done_steps=10)
    now[0] += 20 + 30  # ten steps of two seconds and a validation of thirty
    clock.validated(30.0)
    clock.validations_left = 2
    assert clock.seconds_left(step=20, total=50) == pytest.approx(30 * 2.0 + 2 * 30.0)


def test_a_checkpoint_is_due_before_more_than_the_minutes_are_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    clock, never = SaveClock(minutes=0.5), SaveClock(minutes=None)
    unsaved = []
    for _ in range(20):  # steps of seven seconds, saves of three
        due = clock.due(7.0)
        now[0] += 7.0
        assert not never.due(7.0)
        if due:
            unsaved.append(now[0] - clock._start)
            now[0] += 3.0
            clock.restart()
    assert unsaved == [28.0] * 5
    assert SaveClock(minutes=0.1).due(7.0), "a step longer than the interval is saved on its own"
