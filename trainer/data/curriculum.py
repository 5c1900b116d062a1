"""A training that begins with easier prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from trainer.data.collators.base import TrainingCollator
from trainer.data.reading.counter_rng import uniform_integers

BatchT = TypeVar("BatchT")

_CHOICE = 3  # what the random number of (seed, _CHOICE, step, 0) is for


@dataclass(frozen=True)
class Curriculum(Generic[BatchT]):
    """LLaRA's curriculum (Liao et al., SIGIR 2024, §3.3): prompts of titles alone give way to prompts with vectors.

    Step s of S takes the easy prompts with probability 1 - s / S, for all users of the global batch alike (official
    code), and from step S on none does.
    """

    easy: TrainingCollator[BatchT]
    steps: int
    """S, counted in optimizer steps."""
    fixed_prefix: str
    """Parameters whose names begin with this stay as they are in an easy step."""
    seed: int

    def is_easy(self, step: int) -> bool:
        """Whether step `step` of the run, from 0, takes the easy prompts."""
        return step < self.steps and int(uniform_integers(self.steps, self.seed, _CHOICE, step, 0)[0]) >= step
