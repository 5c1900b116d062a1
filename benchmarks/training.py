"""Measure users and useful tokens per second of training: ours against the published procedure, in one run.

    python -m benchmarks.training [--layers 30] [--users 20] [--steps 5] [--also NAME key=value ...]

Every way starts from the same weights and runs the same users with the same negatives: string or tar to batch, forward,
loss, backward, Adam. The ways take turns, step by step, so that a busy machine slows all of them, and the median step
counts. Their losses must agree in every step.

The default paths are those that `make quickstart` leaves. `--also` times further configurations of ours, given by
overrides of `trainer/presets/llm_srec.yaml`, for example to switch off a single saving.

Two shares of this machine's matmul rate are reported. The rate is measured between the steps, fp32, at the shapes of
the LLM's layers and with as many rows as a step has useful tokens.
    executed  the FLOPs that torch counts in a step: how busy the processor is
    useful    4N FLOPs for each useful token (2N forward, 2N backward; N matmul parameters of the layers run) and
              attention between the tokens of a prompt: the work achieved, whatever is saved or wasted on the way.
              It may exceed 100 %, because savings leave out work that 4N counts.
Useful tokens are those of the user prompts and of the distinct item prompts of a step, without padding.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.machine import RESULTS, describe, executed_flops, matmul_rate, write
from benchmarks.common.plain import PlainLLMSRec, PlainPrompts
from benchmarks.common.setting import PRESET, add_arguments, overrides
from trainer.config import LLMConfig, LLMSRecConfig, RunConfig, load_config
from trainer.data.collators.base import to_device
from trainer.data.collators.retrieval import RetrievalCollator
from trainer.data.reading.dataset import Dataset, open_dataset
from trainer.data.reading.histories import Users
from trainer.data.reading.shards import epoch_batches
from trainer.device import keep_freed_memory
from trainer.models import build_system
from trainer.models.llm.retrieval import DistilledTerms, LLM4Rec
from trainer.planner.costs import useful_step_flops
from trainer.planner.llm_shape import LLMShape

CPU = torch.device("cpu")
OURS, PLAIN, RECOMPUTING = "ours", "plain", "plain-recomputing"


@dataclass
class Way:
    """One way to run a step, with its own copy of the trained modules, and its measurements."""

    name: str
    model: LLM4Rec
    terms: Callable[[Users], DistilledTerms]
    optimizer: torch.optim.Optimizer = field(init=False)
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    """CPU time of all threads: the cost of a step even when other processes share the cores."""
    losses: list[float] = field(default_factory=list)
    flops: int = 0
    """Executed FLOPs of one step."""

    def __post_init__(self) -> None:
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.Adam(trained, lr=1e-4, betas=(0.9, 0.98))

    @property
    def median_seconds(self) -> float:
        """Median seconds per step."""
        return statistics.median(self.seconds)

    def step(self, users: Users) -> float:
        """Run one optimizer step and return its loss."""
        self.optimizer.zero_grad()
        total = self.model.loss(self.terms(users)).total
        torch.autograd.backward(total)
        self.optimizer.step()
        return float(total.detach())


def main() -> None:
    """Measure, print, write."""
    options = _parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    keep_freed_memory()
    config = _config(options)
    dataset = open_dataset(config.data.path, full_check=False)
    ways = [ours(OURS, config, dataset)]
    ways += [ours(name, _config(options, *changes), dataset) for name, *changes in options.also]
    ways += [plain_way(name, config, dataset, recompute=name == RECOMPUTING) for name in options.against]
    batches = list(islice(batches_of(config, dataset), options.steps + 1))
    prompts = PlainPrompts(built(config, dataset)[1], llm_of(config), dataset.titles)
    lengths = [prompts.useful_lengths(users, 0) for users in batches]
    shape = LLMShape.of_folder(Path(llm_of(config).path), llm_of(config).layers)
    rates = take_turns(ways, batches, [(shape, sum(step)) for step in lengths])
    result = _result(options, ways, shape, lengths, rates)
    write(options.out, result)
    _print(result)


def take_turns(ways: Sequence[Way], batches: Sequence[Users], matmuls: Sequence[tuple[LLMShape, int]]) -> list[float]:
    """Run every batch in every way, and measure the matmul rate (FLOP/s) after each batch.

    The first batch warms up: its FLOPs are counted and it is not timed.

    Args:
        matmuls: per batch, the LLM's shape and the number of rows to measure the rate with.

    Returns:
        The rates after the timed batches.
    """
    rates = []
    for index, (users, (shape, tokens)) in enumerate(zip(batches, matmuls, strict=True)):
        for way in ways:
            if index == 0:
                way.flops = executed_flops(partial(way.step, users))
                continue
            start, cpu_start = time.perf_counter(), time.process_time()
            loss = way.step(users)
            way.seconds.append(time.perf_counter() - start)
            way.cpu_seconds.append(time.process_time() - cpu_start)
            way.losses.append(loss)
        rates.append(matmul_rate(shape.linear_shapes, tokens))
    return rates[1:]


def ours(name: str, config: RunConfig, dataset: Dataset, device: torch.device = CPU) -> Way:
    """Our step."""
    model, collator = built(config, dataset)
    model.to(device)
    return Way(name, model, lambda users: model(to_device(collator.train(users, slice(0, len(users)), 0), device)))


def plain_way(name: str, config: RunConfig, dataset: Dataset, device: torch.device = CPU, *, recompute: bool) -> Way:
    """The published step."""
    model, collator = built(config, dataset)
    model.to(device)
    plain = PlainLLMSRec(model, collator, llm_of(config), dataset.titles, recompute=recompute)
    return Way(name, model, lambda users: plain.terms(users, 0))


def built(config: RunConfig, dataset: Dataset) -> tuple[LLM4Rec, RetrievalCollator]:
    """Build model and collator, with the same initial weights at every call."""
    system = build_system(config, dataset)
    model, collator = system.model, system.collator
    assert isinstance(model, LLM4Rec)
    assert isinstance(collator, RetrievalCollator)
    return model.train(), collator


def llm_of(config: RunConfig) -> LLMConfig:
    """Settings of the frozen LLM."""
    assert isinstance(config.system, LLMSRecConfig)
    return config.system.llm


def batches_of(config: RunConfig, dataset: Dataset) -> Iterator[Users]:
    """Global batches of the first epoch."""
    return epoch_batches(
        dataset.path, dataset.manifest, batch_size=config.train.batch_size, shuffle_shards=16, seed=0, epoch=0
    )


def _result(
    options: argparse.Namespace,
    ways: Sequence[Way],
    shape: LLMShape,
    lengths: Sequence[list[int]],
    rates: Sequence[float],
) -> dict[str, Any]:
    """All measurements, as medians over the timed steps."""
    rate = statistics.median(rates)
    useful_tokens = statistics.median(sum(step) for step in lengths[1:])
    useful_flops = statistics.median(useful_step_flops(shape, step) for step in lengths[1:])
    plain = {way.name: way.median_seconds for way in ways if way.name in (PLAIN, RECOMPUTING)}
    table = {}
    for way in ways:
        seconds = way.median_seconds
        table[way.name] = {
            "seconds_a_step": round(seconds, 3),
            "cpu_seconds_a_step": round(statistics.median(way.cpu_seconds), 3),
            "users_per_second": round(options.users / seconds, 3),
            "useful_tokens_per_second": round(useful_tokens / seconds, 1),
            "executed_tflop_a_user": round(way.flops / options.users / 1e12, 5),
            "executed_share_of_matmul_rate": round(way.flops / seconds / rate, 3),
            "useful_share_of_matmul_rate": round(useful_flops / seconds / rate, 3),
            **{f"times_as_fast_as_{name}": round(other / seconds, 2) for name, other in plain.items()},
            "seconds": [round(second, 3) for second in way.seconds],
        }
    first = ways[0].losses
    return {
        "machine": describe(),
        "llm": f"{Path(options.llm).name}, {shape.layers} layers, {shape.matmul_parameters:,} matmul parameters, fp32",
        "data": str(options.data),
        "users_a_step": options.users,
        "useful_tokens_a_step": useful_tokens,
        "matmul_gflop_per_second": round(rate / 1e9, 1),
        "largest_loss_difference": max(abs(a - b) for way in ways for a, b in zip(way.losses, first, strict=True)),
        "ways": table,
    }


def _print(result: dict[str, Any]) -> None:
    print(f"{result['machine']}\n{result['llm']}; {result['users_a_step']} users and "
          f"{result['useful_tokens_a_step']:,.0f} useful tokens per step; fp32 matmul at these shapes "
          f"{result['matmul_gflop_per_second']} GFLOP/s; losses differ by at most "
          f"{result['largest_loss_difference']:.1e}\n")  # fmt: skip
    heads = ("s/step", "CPU s", "users/s", "tokens/s", "executed", "useful", "speed-up")
    print(f"{'':24}" + "".join(f"{head:>10}" for head in heads))
    slowest = max(row["seconds_a_step"] for row in result["ways"].values())
    for name, row in result["ways"].items():
        print(f"{name:24}{row['seconds_a_step']:10.2f}{row['cpu_seconds_a_step']:10.2f}{row['users_per_second']:10.2f}"
              f"{row['useful_tokens_per_second']:10,.0f}{row['executed_share_of_matmul_rate']:10.0%}"
              f"{row['useful_share_of_matmul_rate']:10.0%}{slowest / row['seconds_a_step']:9.2f}x")  # fmt: skip


def _config(options: argparse.Namespace, *changes: str) -> RunConfig:
    return load_config(PRESET, [*overrides(options), f"train.batch_size={options.users}", *changes])


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.training", description=__doc__.split("\n")[0])
    add_arguments(parser)
    parser.add_argument("--users", type=int, default=20, help="users per step")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each way, after one that warms up")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's default")
    parser.add_argument(
        "--also",
        nargs="+",
        action="append",
        default=[],
        metavar=("NAME", "key=value"),
        help="time another configuration of ours in the same run",
    )
    parser.add_argument(
        "--against",
        nargs="*",
        choices=(PLAIN, RECOMPUTING),
        default=(PLAIN, RECOMPUTING),
        help="the published procedure; 'plain' keeps all activations, tens of GB with long titles. No value: ours only",
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "training.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
