"""The checks of `benchmarks.first_gpu`: what tests without a GPU cannot tell.

Each takes `Inputs` and returns what it found: `ok`, `found` in words, and the numbers. On a CPU every check runs too,
with tiny shapes, and says what it could not look at.

Letters: T tokens of a stream, H heads, h KV heads, d head width.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from benchmarks.common.random_llm import write_random_llm, write_tokenizer
from benchmarks.common.setting import LLMS, PRESET
from benchmarks.training import Way, batches_of, ours, plain_way
from trainer.config import RunConfig, load_config
from trainer.data.collators.base import to_device
from trainer.data.prompts.packing import Stream, pack
from trainer.data.prompts.prompt import Prompt
from trainer.data.reading.counter_rng import IntArray
from trainer.data.reading.dataset import open_dataset
from trainer.device import peak_memory_bytes, use_deterministic_algorithms
from trainer.distributed import World, start
from trainer.engine.rank_status import RankStatus
from trainer.evaluation.protocol import Evaluator
from trainer.models.llm.build import prompt_collator
from trainer.nn.llm import attention
from trainer.nn.llm.attention import DecoderPass, attend
from trainer.planner.plan import plan_run
from trainer.runs.preflight import preflight
from trainer.runs.requirements import check_plannable
from trainer.workflows.setup import TrainingSetup, set_up

Found = dict[str, Any]

TINY_LLM: Mapping[str, Any] = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 96, "vocab_size": 1024, "initializer_range": 0.1,
}  # fmt: skip
TEXTS = (
    "This user has made a series of purchases in the following order: "
    'Item No.1, Time: 2015-03-02, "Amber Brass Cedar Denim Ember Flint Grove Hazel Ivory Jade Kelp Linen No. 012345678"'
    ". Based on this sequence of purchases, generate user representation token:",
    'The item title and item embedding are as follows: "Amber", then generate item representation token:',
)
"""Training text of the tokenizer, so that a word of a prompt is about one token, as it is for real ones."""
_MEMORY_TOLERANCE = 0.1
_BF16_STEP = 2.0**-8
"""Relative distance of neighbouring numbers."""
_WARM_UP = 2
_LAYERS_RUN_TWICE = 4
_TRAIN = Path(__file__).parents[2] / "launchers" / "train.py"
_TRAIN_SECONDS = 75


@dataclass(frozen=True)
class Inputs:
    """Dataset, teacher and sizes for the checks."""

    folder: Path
    """For random LLMs and run folders."""
    data: Path
    teacher: Path
    tiny: bool = False
    users: int = 20
    """Users per step."""

    def settings(self, name: str) -> Mapping[str, Any]:
        """Shape of an LLM of `LLMS`; one tiny shape stands for all of them if `tiny`."""
        return TINY_LLM if self.tiny else LLMS[name]

    def llm(self, name: str, device: torch.device) -> Path:
        """Folder of the LLM, written at the first call."""
        folder = self.folder / ("tiny" if self.tiny else name)
        if not (folder / "tokenizer.json").is_file():  # written last
            write_random_llm(folder, self.settings(name), device, "bfloat16")
            write_tokenizer(folder, TEXTS, vocabulary=1000)
        return folder

    def config(self, name: str, world: World, *changes: str) -> RunConfig:
        """LLM-SRec around that LLM, with a run folder of its own."""
        small = ["system.hidden_dim=32", "system.projected_dim=16"] if self.tiny else []
        words = [
            f"output={tempfile.mkdtemp(dir=self.folder, prefix='run-')}", f"data.path={self.data}", "data.verify=false",
            f"system.teacher={self.teacher}", f"system.llm.path={self.llm(name, world.device)}",
            "system.llm.dtype=bfloat16", f"train.batch_size={self.users}", *small, *changes,
        ]  # fmt: skip
        return load_config(PRESET, words)

    def world(self) -> World:
        """The process group of this process alone."""
        return start(1 if self.tiny else 0)


# Attention


def check_attention(inputs: Inputs) -> Found:
    """The variable-length kernel against padded groups, both in bf16, by their distance from groups in fp32."""
    shape = inputs.settings("Llama-3.2-3B")
    return compare_attention(
        shape, random_stream(40 if inputs.tiny else 400, 6 if inputs.tiny else 60), inputs.world().device
    )


def compare_attention(shape: Mapping[str, Any], stream: Stream, device: torch.device) -> Found:
    """See `check_attention`; on random queries, keys and values of this LLM's shape."""
    stream = to_device(stream, device)
    heads = (shape["num_attention_heads"], shape["num_key_value_heads"], shape["num_key_value_heads"])
    torch.manual_seed(0)
    rounded_3 = [torch.randn(1, H, len(stream.token_T), shape["head_dim"], device=device).bfloat16() for H in heads]
    with _groups_only():
        exact, padded = _attention([x.float() for x in rounded_3], stream), _attention(rounded_3, stream)
    of_groups = _distances(padded, exact)
    if attention.varlen_kernel(rounded_3[0]) is None:
        return {"ok": device.type == "cpu", "found": f"no kernel on {device.type}; groups only", "groups": of_groups}
    of_kernel = _distances(_attention(rounded_3, stream), exact)
    # Both round, in another order: one may be a little farther from the exact values than the other.
    ok = all(of_kernel[name] <= 2 * of_groups[name] + _BF16_STEP for name in of_kernel)
    worst = max(of_kernel, key=lambda name: of_kernel[name])
    found = f"{worst}: kernel {of_kernel[worst]:.1e}, groups {of_groups[worst]:.1e} from fp32"
    return {"ok": ok, "found": found, "kernel": of_kernel, "groups": of_groups, "tokens": len(stream.token_T)}


def random_stream(longest: int, prompts: int) -> Stream:
    """Random prompts that share their first tokens, so that segments continue contexts."""
    rng = np.random.default_rng(0)
    beginning_T = rng.integers(0, 100, 16)
    empty: IntArray = np.zeros(0, np.int64)
    found = []
    for _ in range(prompts):
        token_T = np.concatenate([beginning_T, rng.integers(0, 100, rng.integers(8, longest))])
        readout_R = np.array([len(token_T) - 1])
        found.append(Prompt(token_T, empty, empty, readout_R))
    return pack(found, frozen_prefix=False).trained


def _attention(parts_3: Sequence[Tensor], stream: Stream) -> dict[str, Tensor]:
    """Output of one layer's attention, and the gradients of queries, keys and values."""
    query, key, value = (x.clone().requires_grad_() for x in parts_3)
    mixed_1THd, _ = attend(nn.Identity(), query, key, value, None, segments=DecoderPass(stream))
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(mixed_1THd.shape, generator=generator).bfloat16().to(mixed_1THd)
    gradients = torch.autograd.grad(mixed_1THd, (query, key, value), upstream)
    return {"output": mixed_1THd.detach()} | dict(zip(("dQ", "dK", "dV"), gradients, strict=True))


def _distances(found: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> dict[str, float]:
    """Relative distances, |found - exact| / |exact|."""
    return {name: float((found[name].float() - x).norm() / x.norm()) for name, x in exact.items()}


def _groups_only() -> AbstractContextManager[Any]:
    return patch.object(attention, "varlen_kernel", lambda query: None)


# Determinism


def check_repeat(inputs: Inputs) -> Found:
    """The same two steps twice, by two engines: are the trained parameters bitwise equal? Told, not judged."""
    return _repeated(inputs) | {"ok": True}


def check_deterministic_repeat(inputs: Inputs) -> Found:
    """The same as a run with `engine.deterministic=true` takes its steps: they must be bitwise equal."""
    use_deterministic_algorithms()
    try:
        found = _repeated(inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    return found | {"ok": found["largest_difference"] == 0}


def _repeated(inputs: Inputs) -> Found:
    world = inputs.world()
    layers = min(_LAYERS_RUN_TWICE, inputs.settings("Llama-3.2-3B")["num_hidden_layers"])
    ends: list[tuple[float, list[Tensor]]] = []
    for _ in range(2):
        config = inputs.config("Llama-3.2-3B", world, f"system.llm.layers={layers}")
        job = set_up(preflight(config, ranks=1), world)
        losses = [_run_step(job, batches) for batches in islice(job.loader.epoch(0), 2)]
        ends.append((losses[-1], [parameter.detach().float().cpu() for parameter in job.engine.trained.values()]))
    (loss, first), (other_loss, second) = ends
    difference = max(float((a - b).abs().max()) for a, b in zip(first, second, strict=True))
    equal = difference == 0 and loss == other_loss
    said = (
        "bitwise equal" if equal else f"parameters differ by {difference:.1e}, losses by {abs(loss - other_loss):.1e}"
    )
    return {"found": said, "largest_difference": difference, "loss_difference": abs(loss - other_loss)}


def _run_step(job: TrainingSetup, batches: Any) -> float:
    """One optimizer step of the engine; returns its loss."""
    parts = [to_device(batch, job.engine.world.device) for batch in batches.micro_batches]
    rows = len(batches.user_U)
    return job.engine.step(parts, total_rows=rows, seed=0, lr=job.config.train.lr, status=RankStatus()).loss


# Speed and memory


def check_speed(name: str, quantization: str) -> Callable[[Inputs], Found]:
    """Useful tokens per second of training steps, loader included, and their peak memory against the plan's."""

    def check(inputs: Inputs) -> Found:
        world = inputs.world()
        config = inputs.config(name, world, f"system.llm.quantization={quantization}")
        planned = plan_run(config, "h200", 1).forecast.as_configured.bytes.total  # the same on every CUDA device
        job = set_up(preflight(config, ranks=1), world)
        _reset_peak(world.device)
        seconds, tokens = _timed_steps(job, _WARM_UP + (2 if inputs.tiny else 6))
        rate = sum(tokens) / sum(seconds)
        speed = {
            "users_a_step": inputs.users,
            "useful_tokens_a_second": round(rate, 1),
            "seconds_a_step": round(statistics.median(seconds), 4),
            "users_a_second": round(inputs.users * len(seconds) / sum(seconds), 2),
        }
        memory = memory_against_plan(world.device, planned)
        said = f"{rate:,.0f} useful tokens/s, {speed['seconds_a_step']:.3f} s a step; {memory.pop('said')}"
        return {**speed, **memory, "found": said}

    return check


def _timed_steps(job: TrainingSetup, steps: int) -> tuple[list[float], list[int]]:
    """Seconds and useful tokens of the first steps of the run, those that warm up left out."""
    seconds, tokens = [], []
    with closing(job.loader.steps(0, steps)) as ready:
        began = time.perf_counter()
        for batches in ready:
            _run_step(job, batches)
            _synchronize(job.engine.world.device)
            ended = time.perf_counter()
            seconds.append(ended - began)
            tokens.append(sum(batch.prompts.useful_tokens for batch in batches.micro_batches))
            began = ended
    return seconds[_WARM_UP:], tokens[_WARM_UP:]


def memory_against_plan(device: torch.device, planned: int) -> Found:
    """Peak memory against the plan; a CPU has no such figure."""
    if device.type == "cpu":
        return {"ok": True, "planned_gib": round(planned / 2**30, 3), "said": "peak memory not measured on a CPU"}
    peak = peak_memory_bytes()
    ratio = peak / planned
    said = f"peak {peak / 2**30:.1f} GiB, {ratio:.2f} of the plan"
    figures = {"peak_gib": round(peak / 2**30, 3), "planned_gib": round(planned / 2**30, 3), "of_plan": round(ratio, 3)}
    return {"ok": abs(ratio - 1) <= _MEMORY_TOLERANCE, **figures, "said": said}


def check_published(inputs: Inputs) -> Found:
    """The published procedure, recomputing, against ours in the same process: seconds of a step, in turns."""
    world = inputs.world()
    config = inputs.config("Llama-3.2-3B", world)
    dataset = open_dataset(config.data.path, full_check=False)
    published = plain_way("published", config, dataset, world.device, recompute=True)
    nn.Module.to(published.model.reader.llm.decoder, "meta")  # the published procedure loads the LLM on its own
    ways = [ours("ours", config, dataset, world.device), published]
    batches = list(islice(batches_of(config, dataset), 1 + (1 if inputs.tiny else 3)))
    for index, users in enumerate(batches):
        for way in ways:
            _time_step(way, users, world.device, warm_up=index == 0)
    collator = prompt_collator(config, check_plannable(config, 1), dataset, teacher=None)
    counts = (collator.train(users, slice(0, len(users)), 0).prompts.useful_tokens for users in batches[1:])
    tokens = statistics.median(counts)
    fast, slow = (way.median_seconds for way in ways)
    apart = max(abs(a - b) / abs(b) for a, b in zip(*(way.losses for way in ways), strict=True))
    return {
        "ok": apart < 0.05,  # bf16, and Adam's first steps follow the signs of tiny gradients
        "found": f"ours {slow / fast:.2f} times as fast; {tokens / fast:,.0f} against {tokens / slow:,.0f} useful "
        f"tokens/s; losses differ by {apart:.1e}",
        "times_as_fast": round(slow / fast, 3),
        "seconds_a_step": {way.name: round(way.median_seconds, 4) for way in ways},
        "useful_tokens_a_second": {way.name: round(tokens / way.median_seconds, 1) for way in ways},
        "relative_loss_difference": apart,
    }


def _time_step(way: Way, users: Any, device: torch.device, *, warm_up: bool) -> None:
    _synchronize(device)
    began = time.perf_counter()
    loss = way.step(users)
    _synchronize(device)
    if not warm_up:
        way.seconds.append(time.perf_counter() - began)
        way.losses.append(loss)


# Validation


def check_validation(inputs: Inputs) -> Found:
    """One validation: all items, then a sample of users."""
    world = inputs.world()
    config = inputs.config("Llama-3.2-3B", world, f"evaluation.valid_users={20 if inputs.tiny else 400}")
    job = set_up(preflight(config, ranks=1), world)
    job.engine.model.eval()
    began = time.perf_counter()
    metrics = Evaluator(job.dataset, job.system.scoring, config.evaluation, world, config.task).validate()
    _synchronize(world.device)
    seconds = time.perf_counter() - began
    users = min(config.evaluation.valid_users or 0, job.dataset.manifest.num_users)
    return {
        "ok": all(0 <= value <= 1 for value in metrics.values()),
        "found": f"{job.dataset.num_items:,} items and {users:,} users in {seconds:.1f} s",
        "seconds_a_validation": round(seconds, 3),
        "metrics": metrics,
    }


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        get_accelerator().synchronize()


def _reset_peak(device: torch.device) -> None:
    if device.type != "cpu":
        get_accelerator().reset_peak_memory_stats()


# The training command


def check_train_command(inputs: Inputs) -> Found:
    """A short SASRec run by the training command, which the other checks build on; not repeated if it is there."""
    if (inputs.teacher / "config.yaml").is_file():
        return {"ok": True, "found": f"skipped: {inputs.teacher} is there"}
    steps = 4 if inputs.tiny else 40
    words = ["sasrec", f"output={inputs.teacher}", f"data.path={inputs.data}", f"train.max_steps={steps}"]
    began = time.perf_counter()
    command = [sys.executable, str(_TRAIN), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TRAIN_SECONDS, check=False)
    said = done.stderr.strip().splitlines()[-1:] if done.returncode else []
    return {
        "ok": done.returncode == 0,
        "found": said[0] if said else f"{steps} steps and a test in {time.perf_counter() - began:.0f} s",
    }
