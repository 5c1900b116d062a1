"""The plan of a run: its LLM's shape, the device, and what the run will take there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from trainer.config import ALLMRecConfig, LLM4RecConfig, LLMSRecConfig, RunConfig, SASRecConfig, SystemConfig, built_on
from trainer.config.deepspeed_json import load_deepspeed_json, zero_stage
from trainer.config.text_systems import ALLMRecStage1Config
from trainer.data.reading.dataset import open_dataset
from trainer.models.llm.build import prompt_collator
from trainer.models.llm.titled_teacher import title_width
from trainer.planner.devices import Device, DeviceKind, device
from trainer.planner.forecast import Forecast, Planner, StepPlanner
from trainer.planner.llm_shape import FEED_FORWARD, LLMShape
from trainer.planner.overheads import loss_bytes
from trainer.planner.traffic import Rings, term_rings
from trainer.planner.trainable_params import adapters_of, trained_parameters
from trainer.planner.workload import Workload
from trainer.runs.batch_shares import micro_batch_count
from trainer.runs.folder import RunFolder
from trainer.runs.requirements import check_plannable


@dataclass(frozen=True)
class Plan:
    """The forecast of a run on a number of devices of one kind."""

    config: RunConfig
    system: LLM4RecConfig
    shape: LLMShape
    device: Device
    devices: int
    forecast: Forecast


def plan_run(config: RunConfig, kind: DeviceKind, devices: int) -> Plan:
    """Plan a run of a system around an LLM; the runs that it builds on need not be trained yet.

    Raises:
        ValueError: a system without an LLM, an LLM of unknown shape, or more devices than users in a batch.
    """
    planner = planner_of(config, kind, devices)
    micro_batches = micro_batch_count(config.train, devices)
    settings = load_deepspeed_json(config.engine.deepspeed, config.train, micro_batches=micro_batches)
    forecast = planner.forecast(micro_batches, zero_stage(settings))
    return Plan(config, check_plannable(config, devices), planner.step.shape, planner.step.device, devices, forecast)


def planner_of(config: RunConfig, kind: DeviceKind, devices: int) -> Planner:
    """The planner of the run that `plan_run` forecasts.

    Raises:
        ValueError: as `plan_run`.
    """
    system = check_plannable(config, devices)
    shape = LLMShape.of_folder(Path(system.llm.path), system.llm.layers, with_head=config.task == "generation")
    _check_experts(shape, system)
    teacher = _teacher(built_on(system).get("teacher"))
    teacher_dim = teacher.dim + title_width(system, shape.width)
    item_dim = _latent_dim(system.stage1) if isinstance(system, ALLMRecConfig) else teacher_dim
    dataset = open_dataset(config.data.path, full_check=False)
    collator = prompt_collator(config, system, dataset, teacher)
    trained = trained_parameters(system, shape, teacher_dim=teacher_dim, item_dim=item_dim, task=config.task)
    chosen = device(kind, devices)
    workload = Workload.sample(config, dataset, collator, varlen=chosen.joins_segments(system.llm))
    terms, loss_memory = _loss(config, system, workload, devices, teacher_dim)
    step = StepPlanner(
        shape,
        system.llm,
        trained,
        chosen,
        devices,
        adapters_of(system),
        terms=terms,
        loss_bytes=loss_memory,
    )
    return Planner(config, step, workload)


def _check_experts(shape: LLMShape, system: LLM4RecConfig) -> None:
    """Refuse for a mixture of experts what is refused when it is loaded: its experts are no linear layers."""
    if shape.experts is None:
        return
    if system.llm.quantization != "none":
        raise ValueError(
            f"system.llm.quantization={system.llm.quantization} rounds linear layers, which experts are not: "
            "set system.llm.quantization=none"
        )
    if (adapters := adapters_of(system)) and (fed := [name for name in adapters.targets if name in FEED_FORWARD]):
        raise ValueError(
            f"system.lora.targets names {fed[0]}, which experts do not have: choose projections of attention"
        )


def _loss(
    config: RunConfig, system: LLM4RecConfig, workload: Workload, devices: int, teacher_dim: int
) -> tuple[Rings, int]:
    """Traffic of the terms of the loss, and memory of the loss; title generation's, two numbers per user, are not
    counted."""
    if config.task == "generation":
        return Rings(), 0
    users, sizes = config.train.batch_size, workload.loss_sizes(devices)
    terms = term_rings(
        system, users, devices, targets=sizes.targets, items=sizes.items, teacher_dim=teacher_dim
    )  # fmt: skip
    predicted, srec = users * sizes.targets, system if isinstance(system, LLMSRecConfig) else None
    return terms, loss_bytes(
        terms.whole,
        scores=predicted * sizes.items,
        pair_elements=predicted * (predicted - 1) // 2 * system.projected_dim if srec else 0,
        scored_twice=srec is not None and srec.score_distill_weight > 0,
    )


def _teacher(path: Path | None) -> SASRecConfig:
    """The teacher's settings; the defaults if it is not trained yet."""
    found = _section(path)
    return found if isinstance(found, SASRecConfig) else SASRecConfig(name="sasrec")


def _latent_dim(path: Path) -> int:
    """Width of the stage-1 encoding; its default if stage 1 is not trained yet."""
    found = _section(path)
    default: int = ALLMRecStage1Config.model_fields["latent_dim"].default
    return found.latent_dim if isinstance(found, ALLMRecStage1Config) else default


def _section(path: Path | None) -> SystemConfig | None:
    """The settings of a run's system; None if the run does not exist yet."""
    return RunFolder(path).config().system if path and (path / "config.yaml").is_file() else None
