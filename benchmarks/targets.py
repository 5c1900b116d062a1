"""Measure the cost of a target in autoregressive training: one branching prompt per user against one per target.

    python -m benchmarks.targets [--layers 30] [--users 20] [--steps 3] [--threads 1]

Three ways take turns, step by step, on the same users: `targets=window` with branching prompts (a history is read once
and a branch leaves it before each target), the same targets with a separate prompt for each, and `targets=last`, one
target per user. The first two must have the same loss in every step. Seconds are those of a whole step, including item
prompts: four per target, whichever way its history is read.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.machine import RESULTS, describe, write
from benchmarks.common.setting import PRESET, add_arguments, overrides
from benchmarks.training import batches_of, built
from trainer.config import load_config
from trainer.data.collators.retrieval import RetrievalCollator, RetrievalTraining
from trainer.data.prompts.packing import PackedPrompts, pack
from trainer.data.prompts.prompt import Prompt
from trainer.data.prompts.row_packing import unfold
from trainer.data.reading.dataset import open_dataset
from trainer.data.reading.histories import Users
from trainer.models.llm.retrieval import LLM4Rec

WAYS = {"one pass": "window", "a prompt each": "window", "last target": "last"}


@dataclass
class Way:
    """One way to read targets, and the measurements of its steps."""

    model: LLM4Rec
    collator: RetrievalCollator
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    user_tokens: list[int] = field(default_factory=list)

    def step(self, users: Users) -> None:
        """Batch, forward, loss, backward; parameters are not updated, so that losses can be compared across ways."""
        start = time.perf_counter()
        batch = self.collator.train(users, slice(0, len(users)), 0)
        self.model.zero_grad()
        total = self.model.loss(self.model(batch)).total
        torch.autograd.backward(total)
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(float(total.detach()))
        self.targets.append(len(batch.candidate_YC))
        self.tokens.append(batch.prompts.run_tokens)
        self.user_tokens.append(batch.prompts.run_tokens - self._item_tokens(batch))

    def _item_tokens(self, batch: RetrievalTraining) -> int:
        """Tokens run for the item prompts, which come after the user prompts and share no prefix with them."""
        prompts, targets = batch.prompts, len(batch.candidate_YC)
        of_items = prompts.slot_prompt_S >= prompts.readout_prompt_R[targets]
        item_M = prompts.slot_item_S[of_items & (prompts.slot_item_S > 0)]
        return self.collator.items(item_M.numpy()).prompts.run_tokens


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="benchmarks.targets", description=__doc__.split("\n")[0])
    add_arguments(parser)
    parser.add_argument("--users", type=int, default=20, help="users per step")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each way, after one that warms up")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's default")
    parser.add_argument("--out", type=Path, default=RESULTS / "targets.json")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    words = [*overrides(options), f"train.batch_size={options.users}"]
    config = load_config(PRESET, words)
    dataset = open_dataset(config.data.path, full_check=False)
    ways = {
        name: Way(*built(load_config(PRESET, [*words, f"system.targets={targets}"]), dataset))
        for name, targets in WAYS.items()
    }
    ways["a prompt each"].collator = replace(ways["a prompt each"].collator, pack=_apart)
    for users in islice(batches_of(config, dataset), options.steps + 1):
        for way in ways.values():
            way.step(users)
    result = {
        "machine": describe(),
        "llm": f"{Path(options.llm).name}, {options.layers or 'all'} layers, fp32",
        "data": str(options.data),
        "users_a_step": options.users,
        "largest_loss_difference": max(
            abs(a - b) for a, b in zip(ways["one pass"].losses, ways["a prompt each"].losses, strict=True)
        ),
        "ways": {name: _row(way) for name, way in ways.items()},
    }
    write(options.out, result)
    _print(result)


def _apart(prompts: Sequence[Prompt]) -> PackedPrompts:
    """Pack a separate prompt for each branch."""
    return pack([whole for prompt in prompts for whole in unfold(prompt)])


def _row(way: Way) -> dict[str, float]:
    """Medians over the timed steps."""
    measured = (way.seconds, way.targets, way.tokens, way.user_tokens)
    seconds, targets, tokens, user_tokens = (statistics.median(values[1:]) for values in measured)
    return {
        "targets_a_step": targets,
        "tokens_run_a_step": tokens,
        "of_user_prompts": user_tokens,
        "seconds_a_step": round(seconds, 3),
        "seconds_a_target": round(seconds / targets, 4),
    }


def _print(result: dict[str, Any]) -> None:
    print(f"{result['machine']}\n{result['llm']}; {result['users_a_step']} users per step; losses differ by at most "
          f"{result['largest_loss_difference']:.1e}\n")  # fmt: skip
    print(f"{'':16}" + "".join(f"{head:>16}" for head in ("targets", "tokens run", "of users", "s/step", "s/target")))
    for name, row in result["ways"].items():
        print(f"{name:16}" + "".join(f"{value:16,}" for value in row.values()))


if __name__ == "__main__":
    main()
