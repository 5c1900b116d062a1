"""When a run validates, saves and ends, and its learning rate.

Torch-free, so that `compare.py` can tell from a checkpoint whether a run is finished.
"""

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
    """Epochs between validations, possibly a fraction."""

    @classmethod
    def of(cls, train: TrainConfig, num_train_users: int) -> Schedule:
        """The schedule for a dataset with `num_train_users` users to train on."""
        per_epoch = num_steps(num_train_users, train.batch_size)
        total = train.epochs * per_epoch
        return cls(per_epoch, min(total, train.max_steps or total), train.validate_every)

    def validates(self, step: int) -> bool:
        """Whether a validation follows this step (steps count from 1); one always follows the last step."""
        return step == self.total_steps or self._before(step) > self._before(step - 1)

    def validations_after(self, step: int) -> int:
        """Number of validations that remain after this step."""
        if step >= self.total_steps:
            return 0
        last = self.total_steps - 1
        return self._before(last) - self._before(min(step, last)) + 1

    def _before(self, step: int) -> int:
        return validations_done(step, self.steps_per_epoch, self.validate_every)

    def is_over(self, progress: Progress, patience: int) -> bool:
        """Whether no step is left, or the last `patience` validations brought no improvement."""
        return progress.stale >= patience or progress.step >= self.total_steps


def learning_rate(train: TrainConfig, progress: Progress) -> float:
    """Learning rate of the step after `progress`: linear warm-up and decay, times `lr_decay` per validation.

    A function of progress alone, so that resuming is exact.
    """
    warmth = min(1.0, (progress.step + 1) / max(train.warmup_steps, 1))
    left = 1.0
    if train.decay_steps is not None:
        begin = max(train.warmup_steps, train.decay_from)
        left = (train.decay_steps - progress.step) / max(train.decay_steps - begin, 1)
    return train.lr * min(warmth, max(left, 0.0)) * train.lr_decay**progress.validations


class SaveClock:
    """Decides when a checkpoint is due by wall-clock time.

    Args:
        minutes: maximum time between two checkpoints; None: never due.
    """

    def __init__(self, minutes: float | None) -> None:
        self._seconds = math.inf if minutes is None else 60 * minutes
        self.restart()

    def restart(self) -> None:
        """Start a new interval, after a save."""
        self._start = time.monotonic()

    def due(self, step_seconds: float) -> bool:
        """Whether to save after the step that is about to start, because after the following one it would be too late.

        Args:
            step_seconds: duration of a step.
        """
        return time.monotonic() - self._start + 2 * step_seconds > self._seconds


def validations_done(step: int, steps_per_epoch: int, every_epochs: float) -> int:
    """Number of validations in the first `step` steps, with one every `every_epochs` epochs but at most one per step.

    Exact arithmetic: with 0.1, the tenth validation is at the last step of the epoch, never one later.
    """
    interval = Fraction(str(every_epochs)) * steps_per_epoch  # str: 0.1 means one tenth, not the nearest float
    return int(step / interval) if interval >= 1 else step
