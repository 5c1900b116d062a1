"""Memory and time of a run before it starts: `launchers/plan.py PRESET.yaml --devices 8 --kind a6000 key=value ...`.

Tokens are counted in real batches of the run's dataset, with the LLM's tokenizer; of the LLM itself only config.json is
read. The teacher need not be trained yet.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from launchers.command import leave, run_command
from trainer.config import ConfigError, LLM4RecConfig, LLMSRecConfig, RunConfig, SASRecConfig, load_config
from trainer.config.runs import RunFolder
from trainer.engine.deepspeed_json import load_deepspeed_json, zero_stage
from trainer.engine.door import micro_batches
from trainer.reports.costs import LLMShape, trained_parameters
from trainer.reports.devices import Device, Kind, device

if TYPE_CHECKING:
    from trainer.reports.forecast import Forecast, Option

_PARTS = {
    "frozen_weights": "frozen weights",
    "trained": "trained parts, gradients, Adam",
    "activations": "activations",
    "prefix_keys": "keys and values of prefixes",
    "workspace": "workspace",
}


def main(arguments: Sequence[str]) -> None:
    """Print the plan."""
    options = _parse(arguments)
    config = load_config(options.preset, options.overrides)
    if not isinstance(config.system, LLMSRecConfig):
        if isinstance(config.system, LLM4RecConfig):
            raise ConfigError(f"{config.system.name} cannot be planned yet: plan llm_srec with the same system.llm")
        print(f"{config.system.name} has no large language model: any device holds it, and one is enough")
        return
    if options.devices > config.train.batch_size:
        raise ConfigError(f"{options.devices} devices cannot share a batch of {config.train.batch_size} users")
    chosen = device(options.kind, options.devices)
    shape = LLMShape.of_folder(Path(config.system.llm.path), config.system.llm.layers)
    plan = _forecast(config, config.system, shape, chosen, options.devices)
    if options.json:
        facts = {"devices": options.devices, "kind": options.kind, "llm": asdict(shape), **asdict(plan)}
        print(json.dumps(facts, indent=1))
    else:
        _print(config, shape, chosen, options.devices, plan)


def _forecast(config: RunConfig, system: LLMSRecConfig, shape: LLMShape, chosen: Device, devices: int) -> Forecast:
    from trainer.data.catalog import open_dataset
    from trainer.models.build_llm import prompt_collator
    from trainer.reports.forecast import Planner
    from trainer.reports.workload import Workload

    teacher = _teacher(system.teacher)
    dataset = open_dataset(config.data.path, full_check=False)
    collator = prompt_collator(config, system, dataset, teacher)
    trained = trained_parameters(
        shape.width, teacher_dim=teacher.dim, hidden_dim=system.hidden_dim, projected_dim=system.projected_dim
    )
    planner = Planner(config, shape, system.llm, trained, chosen, devices, Workload.sample(config, dataset, collator))
    passes = micro_batches(config, devices)
    stage = zero_stage(load_deepspeed_json(config.engine.deepspeed, config.train, micro_batches=passes))
    return planner.forecast(passes, stage)


def _teacher(path: Path) -> SASRecConfig:
    """The settings of the teacher's run; the defaults before it is trained."""
    if (path / "config.yaml").is_file():
        system = RunFolder(path).config().system
        if isinstance(system, SASRecConfig):
            return system
    return SASRecConfig(name="sasrec")


def _print(config: RunConfig, shape: LLMShape, chosen: Device, devices: int, plan: Forecast) -> None:
    assert isinstance(config.system, LLMSRecConfig)
    step = plan.recommended or plan.as_configured
    print(f"{config.system.name} on {config.data.path}: {shape.layers} layers of {config.system.llm.path}, "
          f"{shape.matmul_parameters / 1e9:.3f} G matmul parameters in {config.system.llm.dtype}; "
          f"{plan.trained_parameters:,} trained parameters\n"
          f"{devices} x {chosen.name}: {chosen.flops[config.system.llm.dtype] / 1e12:.3g} TFLOP/s, of which "
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
    if config.system.llm.quantization == "int8":
        print("int8 saves memory; its time is given as if the weights were not quantized, and LLM.int8() is slower\n")
    _print_memory("as configured", plan.as_configured, chosen)
    if plan.recommended is None:
        print("\nNothing fits: take more or larger devices, a smaller LLM, or a shorter system.max_history")
        return
    if plan.recommended != plan.as_configured:
        _print_memory("recommended", plan.recommended, chosen)
    share = -(-config.train.batch_size // devices)
    users = -(-share // plan.recommended.micro_batches)
    size = f"train.micro_batch_size={users}" if users < share else "train.micro_batch_size=null"
    print(f"\nRecommended: {size} engine.deepspeed=zero{plan.recommended.zero_stage}")


def _print_memory(title: str, option: Option, chosen: Device) -> None:
    parts = asdict(option.bytes)
    print(f"memory of a device, {title} ({option.micro_batches} micro-batch(es), ZeRO-{option.zero_stage}): "
          f"{option.bytes.total / 1e9:.2f} of {chosen.memory / 1e9:.0f} GB, "
          f"{'fits' if option.fits else 'DOES NOT FIT'}")  # fmt: skip
    for key, name in _PARTS.items():
        print(f"  {name:32} {parts[key] / 1e9:8.3f} GB")


def _clock(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d} h"


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="plan.py", description=__doc__.split("\n")[0])
    parser.add_argument("preset", type=Path, help="YAML file, for example trainer/presets/llm_srec.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the preset")
    parser.add_argument("--devices", type=int, default=1, help="of one node")
    parser.add_argument("--kind", choices=get_args(Kind), required=True)
    parser.add_argument("--json", action="store_true")
    return parser.parse_intermixed_args(arguments)


if __name__ == "__main__":
    leave(run_command(main))
