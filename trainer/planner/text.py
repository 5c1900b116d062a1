"""A plan as text."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict

from trainer.planner.forecast import Option
from trainer.planner.overheads import LAUNCH_SECONDS
from trainer.planner.plan import Plan

_PARTS = {
    "frozen_weights": "frozen weights",
    "trained": "trained parts, gradients, Adam",
    "activations": "activations",
    "prefix_keys": "KV cache of prefixes",
    "workspace": "workspace",
}


def plan_text(plan: Plan) -> str:
    """Tokens, time, memory by part, and what to set."""
    blocks = [_workload(plan), *_remarks(plan), _memory(plan, "as configured", plan.forecast.as_configured)]
    recommended = plan.forecast.recommended
    if recommended is None:
        return "\n\n".join(
            [*blocks, "Nothing fits: take more or larger devices, a smaller LLM, or a shorter system.max_history"]
        )
    if recommended != plan.forecast.as_configured:
        blocks.append(_memory(plan, "recommended", recommended))
    return "\n\n".join([*blocks, _recommendation(plan, recommended)])


def _workload(plan: Plan) -> str:
    config, shape, chosen, forecast = plan.config, plan.shape, plan.device, plan.forecast
    llm, step = plan.system.llm, forecast.recommended or forecast.as_configured
    validations = 1 / config.train.validate_every
    return (
        f"{plan.config.system.name} on {config.data.path}: {shape.layers} layers of {llm.path}, "
        f"{shape.matmul_parameters / 1e9:.3f} G matmul parameters in {llm.dtype}; "
        f"{forecast.trained_parameters:,} trained parameters\n"
        f"{plan.devices} x {chosen.name}: {chosen.flops[llm.dtype] / 1e12:.3g} TFLOP/s peak, of which "
        f"{chosen.achieved:.0%} is assumed ({chosen.basis})\n\n"
        f"tokens per step        {forecast.useful_tokens:,.0f} in the prompts of {config.train.batch_size} users; "
        f"run: {forecast.frozen_tokens:,.0f} without gradient, {forecast.trained_tokens:,.0f} with\n"
        f"tokens per validation  {forecast.validation_tokens:,.0f} run\n"
        f"TFLOP                  {step.step_flops / 1e12:,.3g} per step and device; "
        f"{forecast.validation_flops / 1e12:,.3g} per validation on all devices\n"
        f"time                   {step.step_seconds:,.3g} s per step; epoch of {forecast.steps_per_epoch:,} steps "
        f"{_clock(forecast.epoch_seconds)}, with {validations:.3g} validation(s) of "
        f"{_clock(forecast.validation_seconds)}; whole run {_clock(forecast.run_seconds)}, unless it stops early"
    )


def _remarks(plan: Plan) -> Iterator[str]:
    """Assumptions of the forecast, and costs that it leaves out."""
    llm = plan.system.llm
    if llm.packing == "rows":
        waste = plan.forecast.trained_tokens / plan.forecast.useful_tokens
        yield f"rows of {llm.max_tokens} tokens: {waste:.3g} tokens are run per useful token"
    elif plan.device.name == "Intel Gaudi 2":
        yield "Gaudi compiles a graph for each new shape: add system.llm.packing=rows; the plan then counts its padding"
    if plan.config.task == "generation":
        yield (
            "title generation: the LM head is counted, with its logits as workspace; greedy decoding in a test is not"
        )
    yield from _host(plan)
    if plan.forecast.dropout_seconds[1]:
        fused, unfused = (f"{1e3 * seconds:,.0f} ms" for seconds in plan.forecast.dropout_seconds)
        counted = "the first" if plan.forecast.dropout_fused else "the second"
        yield (
            f"dropout of adapters: {fused} per step as one kernel per pass (CUDA with triton, or compiled rows), "
            f"{unfused} as torch's passes; {counted} is counted"
        )
    speed = plan.forecast.quantized_speed
    if llm.quantization == "int8":
        yield f"int8 is for memory: a step runs at {speed:.2f} times the speed of exact weights, by the bytes it moves"
    if llm.quantization == "fp8":
        yield (
            f"fp8: a step runs at {speed:.2f} times the speed of bf16, by products at {plan.device.fp8} times the rate "
            "in forward passes and the bytes moved to round inputs; not measured. int8 saves as much memory, and its "
            "results are closer to those of bf16"
        )


def _host(plan: Plan) -> Iterator[str]:
    """What the host does in a step, and whether the device waits for it."""
    step = plan.forecast.recommended or plan.forecast.as_configured
    low, high = step.launch_seconds
    device, slowest = f"{step.device_seconds:.3g} s of the device", step.step_seconds > step.device_seconds
    if step.launches:
        bound = (
            f"more than the {device}: the host is the floor of a step, and only fewer launches per user help: a larger "
            "train.micro_batch_size or train.batch_size"
            if slowest
            else f"behind the {device}"
        )
        yield (
            f"host: {step.launches:,.0f} kernels per step take {low:.3g} to {high:.3g} s to launch (estimated "
            f"{1e6 * LAUNCH_SECONDS[0]:.0f} to {1e6 * LAUNCH_SECONDS[1]:.0f} us each, in eager mode), {bound}"
        )
    collation, workers = plan.forecast.collation_seconds, plan.config.data.workers
    # The thread that builds batches shares the interpreter with the one that launches; loader processes do not.
    busy = collation / workers if workers else collation + (low + high) / 2
    how = f"{workers} loader process(es)" if workers else "a thread that works ahead"
    if busy <= step.step_seconds:
        yield f"collation: {collation:.3g} s per step on this machine, hidden by {how}"
    else:
        yield (
            f"collation: {collation:.3g} s per step on this machine, which {how} cannot hide: a step takes about "
            f"{busy:.3g} s, unless data.workers={max(workers + 1, math.ceil(collation / step.step_seconds))}"
        )


def _recommendation(plan: Plan, option: Option) -> str:
    share = -(-plan.config.train.batch_size // plan.devices)
    users = -(-share // option.micro_batches)
    size = f"train.micro_batch_size={users}" if users < share else "train.micro_batch_size=null"
    changed = option.recompute != plan.system.llm.recompute
    recompute = f" system.llm.recompute={str(option.recompute).lower()}" if changed else ""
    return f"Recommended: {size} engine.deepspeed=zero{option.zero_stage}{recompute}"


def _memory(plan: Plan, title: str, option: Option) -> str:
    parts = asdict(option.bytes)
    lines = [
        f"memory per device, {title} ({option.micro_batches} micro-batch(es), ZeRO-{option.zero_stage}"
        f"{', recomputing' if option.recompute else ''}): "
        f"{option.bytes.total / 1e9:.2f} of {plan.device.memory / 1e9:.0f} GB, "
        f"{'fits' if option.fits else 'DOES NOT FIT'}"
    ]
    return "\n".join([*lines, *(f"  {name:32} {parts[key] / 1e9:8.3f} GB" for key, name in _PARTS.items())])


def _clock(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d} h"
