"""Curriculum learning: easier prompts in early steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from trainer.data.collators.base import TrainingCollator
from trainer.data.reading.counter_rng import uniform_integers

BatchT = TypeVar("BatchT")

_CHOICE = 3  # domain tag in the address (seed, _CHOICE, step, 0) of a step's draw


@dataclass(frozen=True)
class Curriculum(Generic[BatchT]):
    """LLaRA's curriculum (Liao et al., SIGIR 2024, §3.3): from title-only prompts to prompts with item vectors.

    Step s of S uses the easy prompts with probability 1 - s / S, drawn once for the whole global batch (official
    code); from step S on, no step does.
    """

    easy: TrainingCollator[BatchT]
    """Builds the easy batches."""
    steps: int
    """S, in optimizer steps."""
    fixed_prefix: str
    """Name prefix of the parameters that are not updated in easy steps."""
    seed: int

    def is_easy(self, step: int) -> bool:
        """Whether step `step` of the run, counted from 0, uses the easy prompts."""
        # A draw from [0, S) is at least s with probability 1 - s / S.
        return step < self.steps and int(uniform_integers(self.steps, self.seed, _CHOICE, step, 0)[0]) >= step
