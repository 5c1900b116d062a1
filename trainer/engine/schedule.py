"""When a run validates and ends, and how fast it learns; torch-free: a checkpoint tells whether there is more to do."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from fractions import Fraction

from trainer.config import TrainConfig
from trainer.runs.batch_shares import num_steps
from trainer.runs.folder import Progress


@dataclass(frozen=True)
class Schedule:
    """When a run validates and ends, in steps."""

    steps_per_epoch: int
    total_steps: int
    validate_every: float

    @classmethod
    def of(cls, train: TrainConfig, num_users: int) -> Schedule:
        """The schedule for a dataset of that many users."""
        per_epoch = num_steps(num_users, train.batch_size)
        total = train.epochs * per_epoch
        return cls(per_epoch, min(total, train.max_steps or total), train.validate_every)

    def validates(self, step: int) -> bool:
        """Whether there is a validation after this step (steps count from 1); the last one always has one."""
        return step == self.total_steps or self._before(step) > self._before(step - 1)

    def validations_after(self, step: int) -> int:
        """Validations still to come."""
        if step >= self.total_steps:
            return 0
        last = self.total_steps - 1
        return self._before(last) - self._before(min(step, last)) + 1

    def _before(self, step: int) -> int:
        return validations_done(step, self.steps_per_epoch, self.validate_every)

    def is_over(self, progress: Progress, patience: int) -> bool:
        """Whether no step is left, or `patience` validations in a row brought nothing better."""
        return progress.stale >= patience or progress.step >= self.total_steps


def learning_rate(train: TrainConfig, progress: Progress) -> float:
    """Of the step after `progress`: a function of progress alone, so that resuming is exact."""
    warmth = min(1.0, (progress.step + 1) / max(train.warmup_steps, 1))
    return train.lr * warmth * train.lr_decay**progress.validations


class SaveClock:
    """Tells when a checkpoint is due by time.

    Args:
        minutes: the most that may pass between two; None: it is never due.
    """

    def __init__(self, minutes: float | None) -> None:
        self._seconds = math.inf if minutes is None else 60 * minutes
        self.restart()

    def restart(self) -> None:
        """A checkpoint was written."""
        self._start = time.monotonic()

    def due(self, step_seconds: float) -> bool:
        """Whether to write one after the step that begins: the one after that would end too late.

        Args:
            step_seconds: what a step takes.
        """
        return time.monotonic() - self._start + 2 * step_seconds > self._seconds


def validations_done(step: int, steps_per_epoch: int, every_epochs: float) -> int:
    """How many validations fall in the first `step` steps if there is one each `every_epochs` epochs.

    Exact arithmetic: with 0.1, the tenth validation is at the last step of the epoch, never one later.
    """
    interval = Fraction(str(every_epochs)) * steps_per_epoch
    return int(step / interval) if interval >= 1 else step
