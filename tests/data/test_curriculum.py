"""The curriculum: which steps are easy, independent of ranks, loader processes and interruptions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from trainer.data.curriculum import Curriculum
from trainer.data.loader import StepLoader
from trainer.data.reading.dataset import open_dataset
from trainer.data.reading.histories import Users


@dataclass(frozen=True)
class Named:
    """A collator whose batches are its name."""

    name: str
    max_history: int = 1

    def train(self, users: Users, share: slice, epoch: int) -> str:
        return self.name


def curriculum(steps: int, seed: int = 0) -> Curriculum[str]:
    return Curriculum(Named("easy"), steps, "reader.", seed)


@pytest.mark.parametrize("step", [0, 1, 4, 9, 10, 11, 50])
def test_a_step_is_easy_with_probability_one_minus_its_share(step: int) -> None:
    draws = 4000
    share = sum(curriculum(10, seed).is_easy(step) for seed in range(draws)) / draws
    expected = max(1 - step / 10, 0.0)
    assert abs(share - expected) <= 4 * math.sqrt(expected * (1 - expected) / draws)


def test_steps_are_drawn_independently() -> None:
    easy = [curriculum(10**9).is_easy(step) for step in range(50)]
    assert easy == [True] * 50
    halfway = [curriculum(100, seed).is_easy(50) != curriculum(100, seed).is_easy(51) for seed in range(400)]
    assert 0.4 < sum(halfway) / 400 < 0.6


def loader(world: Path, **changes: Any) -> StepLoader[str]:
    """61 users in batches of 20: four steps per epoch."""
    settings: dict[str, Any] = {"micro_batches": 1, "workers": 0, "rank": 0, "world_size": 1} | changes
    return StepLoader(
        open_dataset(world, full_check=False), Named("hard"), 20,
        shuffle_shards=2, seed=5, curriculum=curriculum(10), **settings,
    )  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rank": 1, "world_size": 2},
        {"micro_batches": 3},
        pytest.param({"workers": 2}, marks=pytest.mark.process),
    ],
    ids=str,
)
def test_the_loader_follows_it_at_any_number_of_ranks_and_processes(world: Path, changes: dict[str, Any]) -> None:
    chosen = [curriculum(10).is_easy(step) for step in range(12)]
    assert 2 < sum(chosen) < 10
    for epoch in range(3):
        for first in (0, 2):
            steps = list(loader(world, **changes).epoch(epoch, first))
            assert [step.easy for step in steps] == chosen[4 * epoch + first : 4 * epoch + 4]
            for step in steps:
                assert set(step.micro_batches) == {"easy" if step.easy else "hard"}
