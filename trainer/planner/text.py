"""A plan as text."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from trainer.config import LLM4RecConfig, RunConfig
from trainer.planner.devices import Device
from trainer.planner.llm_shape import LLMShape

if TYPE_CHECKING:
    from trainer.planner.forecast import Forecast, Option

_PARTS = {
    "frozen_weights": "frozen weights",
    "trained": "trained parts, gradients, Adam",
    "activations": "activations",
    "prefix_keys": "keys and values of prefixes",
    "workspace": "workspace",
}


def print_plan(config: RunConfig, shape: LLMShape, chosen: Device, devices: int, plan: Forecast) -> None:
    """Tokens, time, memory by part, and what to set."""
    assert isinstance(config.system, LLM4RecConfig)
    llm, step = config.system.llm, plan.recommended or plan.as_configured
    print(f"{config.system.name} on {config.data.path}: {shape.layers} layers of {llm.path}, "
          f"{shape.matmul_parameters / 1e9:.3f} G matmul parameters in {llm.dtype}; "
          f"{plan.trained_parameters:,} trained parameters\n"
          f"{devices} x {chosen.name}: {chosen.flops[llm.dtype] / 1e12:.3g} TFLOP/s, of which "
          f"{chosen.achieved:.0%} are counted on ({chosen.basis})\n")  # fmt: skip
    validations = 1 / config.train.validate_every
    print(f"tokens a step        {plan.useful_tokens:,.0f} in the prompts of {config.train.batch_size} users; run: "
          f"{plan.frozen_tokens:,.0f} without gradient, {plan.trained_tokens:,.0f} with\n"
          f"tokens a validation  {plan.validation_tokens:,.0f} run\n"
          f"TFLOP                {step.step_flops / 1e12:,.3g} a step and device; "
          f"{plan.validation_flops / 1e12:,.3g} a validation of all devices\n"
          f"time                 {step.step_seconds:,.3g} s a step; epoch of {plan.steps_per_epoch:,} steps "
          f"{_clock(plan.epoch_seconds)}, with {validations:.3g} validation(s) of {_clock(plan.validation_seconds)}; "
          f"whole run {_clock(plan.run_seconds)}, unless it stops early\n")  # fmt: skip
    if llm.packing == "rows":
        waste = plan.trained_tokens / plan.useful_tokens
        print(f"rows of {llm.max_tokens} tokens: {waste:.3g} tokens are run for a useful one\n")
    elif chosen.name == "Intel Gaudi 2":
        print("Gaudi compiles a graph for each new shape: add system.llm.packing=rows, whose padding is then counted\n")
    if config.task == "generation":
        print("choosing titles: the LM head is counted, and its logits are workspace; what a test decodes "
              "greedily is not\n")  # fmt: skip
    if llm.quantization == "int8":
        print("int8 saves memory; its time is given as if the weights were not quantized, and LLM.int8() is slower\n")
    if llm.quantization == "fp8":
        print(f"fp8 is counted as {chosen.fp8} times as fast as bf16 in forward passes alone, as published for whole "
              "training of a 3B model on H100, not measured here; its results are not those of bf16\n")  # fmt: skip
    _print_memory("as configured", plan.as_configured, chosen)
    if plan.recommended is None:
        print("\nNothing fits: take more or larger devices, a smaller LLM, or a shorter system.max_history")
        return
    if plan.recommended != plan.as_configured:
        _print_memory("recommended", plan.recommended, chosen)
    share = -(-config.train.batch_size // devices)
    users = -(-share // plan.recommended.micro_batches)
    size = f"train.micro_batch_size={users}" if users < share else "train.micro_batch_size=null"
    again = plan.recommended.recompute
    change = f" system.llm.recompute={str(again).lower()}" if again != llm.recompute else ""
    print(f"\nRecommended: {size} engine.deepspeed=zero{plan.recommended.zero_stage}{change}")


def _print_memory(title: str, option: Option, chosen: Device) -> None:
    parts = asdict(option.bytes)
    print(f"memory of a device, {title} ({option.micro_batches} micro-batch(es), ZeRO-{option.zero_stage}"
          f"{', recomputing' if option.recompute else ''}): "
          f"{option.bytes.total / 1e9:.2f} of {chosen.memory / 1e9:.0f} GB, "
          f"{'fits' if option.fits else 'DOES NOT FIT'}")  # fmt: skip
    for key, name in _PARTS.items():
        print(f"  {name:32} {parts[key] / 1e9:8.3f} GB")


def _clock(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d} h"
