"""Forecasts: tokens of the real batches, memory as measured, settings that fit."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import LLM_SYSTEMS, llm4rec_config, llm_srec_config, write_config
from plan_helpers import build_larger_llm

from benchmarks.common.machine import executed_flops
from trainer.config import LLM4RecConfig, RunConfig, SASRecConfig, parse_config
from trainer.data.collators.retrieval import RetrievalCollator
from trainer.data.loader import StepLoader
from trainer.data.reading.dataset import open_dataset
from trainer.data.reading.shards import read_in_order
from trainer.models import build_system
from trainer.models.llm.build import prompt_collator
from trainer.planner.costs import backward_flops, forward_flops
from trainer.planner.devices import Device
from trainer.planner.forecast import Forecast, Option, Planner, StepPlanner
from trainer.planner.llm_shape import LLMShape
from trainer.planner.trainable_params import adapters_of, trained_parameters
from trainer.planner.workload import Workload

BATCH = 12
TEACHER = SASRecConfig(name="sasrec", dim=16, max_length=12)
DEVICE = Device("device", {"float32": 1e12}, achieved=0.5, basis="test", memory=10**12, link=1e9)


@pytest.fixture(scope="module")
def larger_llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_larger_llm(tmp_path_factory.mktemp("larger"))


@pytest.fixture(scope="module")
def talking_llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An LLM with a vocabulary large enough for its logits to matter."""
    return build_larger_llm(tmp_path_factory.mktemp("talking"), vocab_size=30_000, tie_word_embeddings=False)


@pytest.fixture(scope="module")
def config(world: Path, larger_llm: Path) -> RunConfig:
    return parse_config(llm_srec_config(world, Path("unused"), Path("none"), larger_llm, batch_size=BATCH), "test")


@pytest.fixture(scope="module")
def workload(config: RunConfig, world: Path) -> Workload:
    return _workload(config, world)


def _workload(config: RunConfig, world: Path) -> Workload:
    dataset = open_dataset(world, full_check=False)
    return Workload.sample(config, dataset, prompt_collator(config, _system(config), dataset, TEACHER))


def _collator(workload: Workload) -> RetrievalCollator:
    assert isinstance(workload.collator, RetrievalCollator)
    return workload.collator


def _system(config: RunConfig) -> LLM4RecConfig:
    assert isinstance(config.system, LLM4RecConfig)
    return config.system


def _planner(workload: Workload, larger_llm: Path, device: Device = DEVICE, ranks: int = 1) -> Planner:
    config, system = workload.config, _system(workload.config)
    shape = LLMShape.of_folder(larger_llm, with_head=config.task == "generation")
    item_dim = 12 if config.system.name == "a_llmrec" else 16
    trained = trained_parameters(system, shape, teacher_dim=16, item_dim=item_dim, task=config.task)
    step = StepPlanner(shape, system.llm, trained, device, ranks, adapters_of(system))
    return Planner(config, step, workload)


def _plan(workload: Workload, larger_llm: Path, *, memory: float = 1e12, ranks: int = 1, link: float = 1e9) -> Forecast:
    device = replace(DEVICE, memory=int(memory), link=link)
    return _planner(workload, larger_llm, device, ranks).forecast(1, 1)


def _option(planner: Planner, micro_batches: int, *, recompute: bool) -> Option:
    steps = planner.workload.training(micro_batches, planner.step.ranks)
    return planner.step.option(steps, 1, recompute=recompute)


@pytest.mark.parametrize(("ranks", "micro_batches"), [(1, 1), (3, 2)])
def test_tokens_are_those_of_the_batches_that_a_rank_runs(workload: Workload, ranks: int, micro_batches: int) -> None:
    loader = StepLoader(
        workload.dataset, _collator(workload), BATCH, micro_batches, shuffle_shards=2, seed=0, workers=0, rank=0,
        world_size=ranks,
    )  # fmt: skip
    estimated = workload.training(micro_batches, ranks)
    assert len(estimated) == 61 // BATCH, "the last batch, of one user, is not sampled"
    for step, loads in zip(loader.epoch(0), estimated, strict=False):
        packed = [batch.prompts for batch in step.micro_batches]
        assert [load.useful for load in loads] == [prompts.useful_tokens for prompts in packed]
        assert [load.run for load in loads] == [prompts.run_tokens for prompts in packed]


def test_validation_tokens_are_those_of_all_items_and_users(workload: Workload) -> None:
    """The dataset is smaller than the sample, so the estimate must be exact."""
    collator, dataset = _collator(workload), workload.dataset
    weighed = workload.validation()
    items = collator.items(np.arange(1, dataset.num_items + 1)).prompts.useful_tokens
    everyone = next(read_in_order(dataset.path, dataset.manifest)).train
    users = collator.histories(everyone).prompts.useful_tokens
    assert sum(load.useful * weight for load, weight in weighed) == pytest.approx(items + users, rel=0.1)


@pytest.mark.parametrize(
    ("name", "task", "system"),
    [
        *((name, "retrieval", {}) for name in LLM_SYSTEMS),
        *((name, "generation", {}) for name in LLM_SYSTEMS if name != "llm_srec"),
        ("collm", "retrieval", {"projectors": "shared"}),
    ],
)
def test_parameters_are_those_of_the_real_system(
    name: str, task: str, system: dict[str, str], world: Path, teacher: Path, stage1: Path, talking_llm: Path
) -> None:
    """Trained parameters, and frozen ones of the LLM."""
    tree = llm4rec_config(name, world, Path("unused"), talking_llm, {"teacher": teacher, "stage1": stage1})
    tree["system"] |= {"llm": {**tree["system"]["llm"], "max_tokens": 512}} | system
    config = parse_config(tree | {"task": task}, "test")
    model = build_system(config, open_dataset(world, full_check=False)).model
    planner = _planner(_workload(config, world), talking_llm)
    assert planner.step.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    of_llm = [
        p for key, p in model.named_parameters() if key.startswith(("reader.llm", "head")) and not p.requires_grad
    ]
    assert planner.step.shape.parameters == sum(p.numel() for p in of_llm)


@pytest.mark.parametrize("name", ["tallrec", "collm", "a_llmrec"])
def test_choosing_titles_costs_the_flops_that_torch_counts(
    name: str, world: Path, teacher: Path, stage1: Path, talking_llm: Path
) -> None:
    """In a real training step, and in comparing the candidates of users; the LM head is a noticeable part of both."""
    tree = llm4rec_config(name, world, Path("unused"), talking_llm, {"teacher": teacher, "stage1": stage1})
    tree["system"]["llm"] |= {"max_tokens": 512}
    config = parse_config(tree | {"task": "generation"}, "test")
    workload = _workload(config, world)
    built = build_system(config, workload.dataset)
    model: Any = built.model
    collator: Any = built.collator
    planner = _planner(workload, talking_llm)
    shape, adapters = planner.step.shape, planner.step.adapters

    batch = collator.train(workload.batches[0], slice(0, BATCH), 0)
    [[load], *_] = workload.training(1, 1)
    forward = executed_flops(lambda: model.train()(batch))
    both = executed_flops(lambda: torch.autograd.backward(model.loss(model.train()(batch)).total))
    assert forward_flops(shape, load, adapters) == pytest.approx(forward, rel=0.02)
    assert backward_flops(shape, load, adapters) == pytest.approx(both - forward, rel=0.02)
    without = replace(load, logits=0)
    assert forward_flops(shape, load, adapters) > 1.05 * forward_flops(shape, without, adapters)

    users, target_U = next(read_in_order(world, workload.dataset.manifest)).targets("valid")
    few = users.take(slice(0, config.evaluation.batch_size))
    negative_BC = workload.dataset.candidates("title", "valid")[few.user_U]
    choices = collator.choices(few, np.concatenate([target_U[: len(few), None], negative_BC], axis=1))
    compared = executed_flops(lambda: model.eval().compare(choices))
    first, weight = workload.validation()[0]
    assert forward_flops(shape, first, adapters) == pytest.approx(compared, rel=0.02)
    assert weight == 61 / 20, "the first of three shards is sampled"


MEASURED: dict[str, tuple[str, str, dict[str, object]]] = {
    "llm_srec": ("llm_srec", "retrieval", {}),
    "llm_srec recomputed": ("llm_srec", "retrieval", {"recompute": True}),
    "llm_srec rows": ("llm_srec", "retrieval", {"packing": "rows"}),
    "collm": ("collm", "retrieval", {}),
    "tallrec recomputed": ("tallrec", "retrieval", {"recompute": True}),
    "llara generation": ("llara", "generation", {}),
    "tallrec generation recomputed": ("tallrec", "generation", {"recompute": True}),
}
"""Systems, tasks and LLM settings whose memory is measured."""


@pytest.fixture(scope="module")
def measured(
    tmp_path_factory: pytest.TempPathFactory, world: Path, teacher: Path, larger_llm: Path, talking_llm: Path
) -> dict[str, tuple[dict[str, Any], int]]:
    """Configurations and the peak growth of a step of each, from one command: a start takes longer than a step."""
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs Linux to measure a peak")
    folder = tmp_path_factory.mktemp("memory")
    trees = {}
    for case, (name, task, llm) in MEASURED.items():
        path = talking_llm if task == "generation" else larger_llm
        tree = llm4rec_config(name, world, folder / case, path, {"teacher": teacher}, batch_size=BATCH)
        tree["system"]["llm"] |= {"max_tokens": 512 if task == "generation" else 256} | llm
        trees[case] = tree | {"task": task}
    presets = [write_config(folder / f"{number}.json", tree) for number, tree in enumerate(trees.values())]
    # Freed memory returns to the system at once; otherwise a lazy allocator would count as holding it.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, str(Path(__file__).with_name("memory_worker.py")), *map(str, presets)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return {case: (tree, int(peak)) for (case, tree), peak in zip(trees.items(), done.stdout.split(), strict=True)}


@pytest.mark.process
@pytest.mark.parametrize("case", MEASURED)
def test_memory_is_what_a_real_step_takes(
    case: str, measured: dict[str, tuple[dict[str, Any], int]], world: Path, larger_llm: Path, talking_llm: Path
) -> None:
    """Peak growth of a process through one step, within 25 % of the forecast."""
    tree, peak = measured[case]
    workload = _workload(parse_config(tree, "test"), world)
    planner = _planner(workload, talking_llm if tree["task"] == "generation" else larger_llm)
    parts = planner.step.bytes(workload.training(1, 1)[0][0], 0, recompute=planner.step.llm.recompute)
    held_before = parts.frozen_weights + 4 * planner.step.trained
    assert parts.total - held_before == pytest.approx(peak, rel=0.25)


def test_activations_are_recomputed_only_when_memory_needs_it(workload: Workload, larger_llm: Path) -> None:
    roomy = _plan(workload, larger_llm)
    assert roomy.recommended == roomy.as_configured
    assert roomy.as_configured.fits
    planner = _planner(workload, larger_llm)
    recomputing = replace(planner.step, llm=planner.step.llm.model_copy(update={"recompute": True}))
    needless = replace(planner, step=recomputing).forecast(1, 1)
    assert needless.as_configured.recompute
    assert needless.recommended == roomy.recommended

    needed = roomy.as_configured.bytes.total / 0.9
    tight = _plan(workload, larger_llm, memory=needed * 0.7)
    assert not tight.as_configured.fits
    assert tight.recommended is not None
    assert (tight.recommended.recompute, tight.recommended.micro_batches) == (True, 1)
    assert tight.recommended.bytes.total <= needed * 0.7 * 0.9
    # One more forward pass, about half the cost of a step.
    assert 1.2 < tight.recommended.step_seconds / roomy.as_configured.step_seconds < 1.6


def test_the_fewest_micro_batches_that_fit_are_recommended(workload: Workload, larger_llm: Path) -> None:
    """If not even a single recomputed one fits. Several cost a forward pass, as recomputation does."""
    planner = _planner(workload, larger_llm)
    room = _option(planner, 1, recompute=True).bytes.total - 1
    found = _plan(workload, larger_llm, memory=room / 0.9).recommended
    assert found is not None
    assert not found.recompute
    fewer = {2: 1, 3: 2, 4: 3, 6: 4, 12: 6}[found.micro_batches]
    assert found.bytes.total <= room < _option(planner, fewer, recompute=False).bytes.total
    assert _plan(workload, larger_llm, memory=1e6).recommended is None


def test_the_llm_is_split_only_when_it_does_not_fit(workload: Workload, larger_llm: Path) -> None:
    roomy = _plan(workload, larger_llm, ranks=4)
    assert roomy.recommended is not None
    assert roomy.recommended.zero_stage == 1
    weights = roomy.as_configured.bytes.frozen_weights
    smallest = _option(_planner(workload, larger_llm, ranks=4), 3, recompute=True).bytes.total
    split = _plan(workload, larger_llm, ranks=4, memory=(smallest - weights / 4) / 0.9, link=1e12)
    assert split.recommended is not None
    assert split.recommended.zero_stage == 3


def test_time_follows_devices_and_validations(workload: Workload, larger_llm: Path) -> None:
    one, four = _plan(workload, larger_llm, link=1e15), _plan(workload, larger_llm, ranks=4, link=1e15)
    # Not quite a quarter: fewer prompts share each prefix.
    assert 0.25 <= four.as_configured.step_seconds / one.as_configured.step_seconds < 0.35
    assert four.validation_seconds == pytest.approx(one.validation_seconds / 4)
    steps = one.steps_per_epoch
    assert steps == -(-61 // BATCH)
    validations = 2 * one.validation_seconds  # every half epoch
    assert one.epoch_seconds == pytest.approx(steps * one.as_configured.step_seconds + validations)
    assert one.run_seconds == pytest.approx(2 * one.epoch_seconds)


def test_zero_2_reduces_the_gradients_of_each_micro_batch(workload: Workload, larger_llm: Path) -> None:
    planner = _planner(workload, larger_llm, ranks=4)
    steps = workload.training(3, 4)
    one, two = (planner.step.option(steps, stage, recompute=False).step_seconds for stage in (1, 2))
    gradients = 4 * planner.step.trained
    assert two - one == pytest.approx((3 - 1) * 2 * gradients * 3 / 4 / DEVICE.link)


def test_an_unknown_rate_is_refused(workload: Workload, larger_llm: Path) -> None:
    with pytest.raises(ValueError, match=r"set system\.llm\.dtype=bfloat16"):
        _planner(workload, larger_llm, replace(DEVICE, flops={"bfloat16": 1.0}))


def test_fp8_gains_in_products_and_loses_in_bytes(workload: Workload, larger_llm: Path) -> None:
    """Whether it gains at all depends on the bandwidth."""
    exact = _planner(workload, larger_llm, replace(DEVICE, fp8=2.0)).forecast(1, 1)
    assert exact.quantized_speed == 1.0
    found = []
    for bandwidth in (1e15, 1e9):
        planner = _planner(workload, larger_llm, replace(DEVICE, fp8=2.0, bandwidth=bandwidth))
        llm = planner.step.llm.model_copy(update={"quantization": "fp8"})
        found.append(replace(planner, step=replace(planner.step, llm=llm)).forecast(1, 1))
    quick, slow = found
    assert quick.as_configured.step_flops == exact.as_configured.step_flops
    assert slow.quantized_speed < 1.0 < quick.quantized_speed
    # Linear layers, which attain 0.65 of the peak, take half of their part; attention and the rest stay.
    assert 1 - 0.5 / 0.65 / 2 < quick.validation_seconds / exact.validation_seconds < 0.7
    assert quick.as_configured.bytes.frozen_weights < exact.as_configured.bytes.frozen_weights
    with pytest.raises(ValueError, match=r"no fp8 rate is known .*: set system\.llm\.quantization=none \(or int8\)"):
        replace(planner.step, device=DEVICE, llm=llm)


def test_the_host_is_the_floor_of_a_step(workload: Workload, larger_llm: Path) -> None:
    """On a device that is fast enough, a step takes the launches of the host, and micro-batches add to them."""
    fast = replace(DEVICE, flops={"float32": 1e18}, link=1e18)
    assert _planner(workload, larger_llm, fast).forecast(1, 1).as_configured.launches == 0, "not counted"
    planner = _planner(workload, larger_llm, replace(fast, launched=True))
    one, three = (planner.forecast(count, 1).as_configured for count in (1, 3))
    low, high = one.launch_seconds
    assert one.device_seconds < low < one.step_seconds < high
    assert three.step_seconds > 2 * one.step_seconds
    slow = _planner(workload, larger_llm, replace(DEVICE, launched=True)).forecast(1, 1).as_configured
    assert slow.launches == one.launches
    assert slow.step_seconds == slow.device_seconds


def test_the_dropout_of_adapters_is_counted(world: Path, larger_llm: Path) -> None:
    tree = llm4rec_config("tallrec", world, Path("unused"), larger_llm, {}, batch_size=BATCH)
    workload = _workload(parse_config(tree, "test"), world)
    times = {}
    for triton in (True, False):
        device = replace(DEVICE, bandwidth=1e11, triton=triton)
        found = _planner(workload, larger_llm, device).forecast(1, 1)
        times[triton] = found.as_configured.step_seconds
        assert found.dropout_fused == triton
    fused, unfused = found.dropout_seconds
    assert times[False] - times[True] == pytest.approx(unfused - fused)
    # fp32 inputs of q_proj and v_proj in six layers, read and written by both passes.
    tokens = np.mean([step[0].trained for step in workload.training(1, 1)])
    assert fused == pytest.approx(2 * 8 * 2 * 256 * 6 * tokens / (0.85 * 1e11))
