"""When a run validates and ends, and how fast it learns; torch-free: a checkpoint tells whether there is more to do."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.config import TrainConfig
from trainer.data.reading.sample_order import num_steps, validations_done
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
