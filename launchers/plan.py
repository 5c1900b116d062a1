"""Memory and time of a run before it starts: `launchers/plan.py PRESET.yaml --devices 8 --kind a6000 key=value ...`.

Tokens are counted in real batches of the run's dataset, with the LLM's tokenizer; of the LLM itself only config.json is
read. What the system builds on (a teacher, a first stage) need not be trained yet.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from launchers.command import leave, run_command
from trainer.config import (
    ALLMRecConfig,
    ConfigError,
    LLM4RecConfig,
    RunConfig,
    SASRecConfig,
    SystemConfig,
    built_on,
    load_config,
)
from trainer.config.deepspeed_json import load_deepspeed_json, zero_stage
from trainer.config.text_systems import ALLMRecStage1Config
from trainer.planner.devices import Device, Kind, device
from trainer.planner.llm_shape import LLMShape
from trainer.planner.text import print_plan
from trainer.runs.folder import RunFolder
from trainer.runs.preflight import micro_batches
from trainer.runs.requirements import check_task

if TYPE_CHECKING:
    from trainer.planner.forecast import Forecast


def main(arguments: Sequence[str]) -> None:
    """Print the plan."""
    options = _parse(arguments)
    config = load_config(options.preset, options.overrides)
    if not isinstance(config.system, LLM4RecConfig):
        raise ConfigError(
            f"{config.system.name} has no large language model to plan for: any device holds it, and one is enough"
        )
    check_task(config, config.task, config.evaluation)
    if options.devices > config.train.batch_size:
        raise ConfigError(f"{options.devices} devices cannot share a batch of {config.train.batch_size} users")
    chosen = device(options.kind, options.devices)
    llm = config.system.llm
    shape = LLMShape.of_folder(Path(llm.path), llm.layers, with_head=config.task == "generation")
    plan = _forecast(config, config.system, shape, chosen, options.devices)
    if options.json:
        facts = {"devices": options.devices, "kind": options.kind, "llm": asdict(shape), **asdict(plan)}
        print(json.dumps(facts, indent=1))
    else:
        print_plan(config, shape, chosen, options.devices, plan)


def _forecast(config: RunConfig, system: LLM4RecConfig, shape: LLMShape, chosen: Device, devices: int) -> Forecast:
    from trainer.data.reading.dataset import open_dataset
    from trainer.models.llm.build import prompt_collator
    from trainer.planner.forecast import Planner, StepPlanner
    from trainer.planner.trainable_params import adapters_of, trained_parameters
    from trainer.planner.workload import Workload

    teacher = _teacher(built_on(system).get("teacher"))
    item_dim = _latent_dim(system.stage1) if isinstance(system, ALLMRecConfig) else teacher.dim
    dataset = open_dataset(config.data.path, full_check=False)
    collator = prompt_collator(config, system, dataset, teacher)
    trained = trained_parameters(system, shape, teacher_dim=teacher.dim, item_dim=item_dim, task=config.task)
    step = StepPlanner(shape, system.llm, trained, chosen, devices, adapters_of(system))
    planner = Planner(config, step, Workload.sample(config, dataset, collator))
    passes = micro_batches(config, devices)
    stage = zero_stage(load_deepspeed_json(config.engine.deepspeed, config.train, micro_batches=passes))
    return planner.forecast(passes, stage)


def _teacher(path: Path | None) -> SASRecConfig:
    """The settings of the teacher's run; the defaults before it is trained."""
    found = _section(path)
    return found if isinstance(found, SASRecConfig) else SASRecConfig(name="sasrec")


def _latent_dim(path: Path) -> int:
    """Width of the stage-1 encoding; its default before it is trained."""
    found = _section(path)
    default: int = ALLMRecStage1Config.model_fields["latent_dim"].default
    return found.latent_dim if isinstance(found, ALLMRecStage1Config) else default


def _section(path: Path | None) -> SystemConfig | None:
    """The settings of a run's system, where there is a run."""
    return RunFolder(path).config().system if path and (path / "config.yaml").is_file() else None


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
