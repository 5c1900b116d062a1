"""A plan as text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

from trainer.planner.forecast import Option
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
    if llm.quantization == "int8":
        yield "int8 saves memory; converting the weights in each pass is not counted in the time"
    if llm.quantization == "fp8":
        yield (
            f"fp8 is assumed to be {plan.device.fp8} times as fast as bf16, in forward passes only, as published for "
            "end-to-end training of a 3B model on H100, not measured here; its results differ from those of bf16"
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
