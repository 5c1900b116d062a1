"""Training steps of an LLM system on a fake CUDA device: the project's model, engine and DeepSpeed, at true shapes.

The weights of the LLM, the teacher and stage 1 are fake too, so that no files of them are needed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from fake_torch import join
from fake_trace import Trace
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModel, PretrainedConfig, PreTrainedModel

from trainer.config import ALLMRecConfig, RunConfig, SASRecConfig, built_on, load_config
from trainer.config.deepspeed_json import load_deepspeed_json, zero_stage
from trainer.config.text_systems import ALLMRecStage1Config
from trainer.data.collators.base import to_device
from trainer.distributed import World
from trainer.engine.engine import Engine
from trainer.engine.rank_status import RankStatus
from trainer.models.by_id.sasrec import SASRec
from trainer.models.by_text.a_llmrec_stage1 import AutoEncoder
from trainer.models.llm.build import FrozenParts, build_distillation, build_reader
from trainer.models.llm.retrieval import LLM4Rec
from trainer.models.llm.variants import variant_of
from trainer.nn.llm.backbone import load_llm
from trainer.planner.plan import planner_of
from trainer.planner.workload import Workload
from trainer.runs.batch_shares import share


@dataclass(frozen=True)
class Scenario:
    """A configuration, and the rank that runs it."""

    preset: str
    overrides: tuple[str, ...]
    rank: int = 0
    ranks: int = 8
    steps: int = 2
    """Optimizer steps, of which the last one is described: the first one also creates what later ones find."""


def run(scenario: Scenario) -> dict[str, Any]:
    """Run the scenario's steps; returns what the last one did, and what the planner predicts of it."""
    config = load_config(Path(scenario.preset), scenario.overrides)
    world = World(scenario.rank, scenario.ranks, join(scenario.rank, scenario.ranks))
    planner = planner_of(config, "h200", world.size)
    settings = load_deepspeed_json(config.engine.deepspeed, config.train, micro_batches=1)
    trace, gradients = Trace(), Counter[str]()
    with FakeTensorMode(allow_non_fake_inputs=True):  # a batch is real until it is copied to the device
        model = fake_model(config, planner.workload.dataset.num_items)
        if scenario.steps:
            model.to(world.device)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.register_hook(_kind_counter(gradients))  # type: ignore[no-untyped-call]
        with trace:
            trace.register([*model.parameters(), *model.buffers()])
            engine = Engine(model, config.train, settings, world)
            found = {"initialize": {"peak": trace.peak, "left": trace.live, "collectives": list(trace.collectives)}}
            for _ in range(scenario.steps):
                trace.restart()
                gradients.clear()
                _step(engine, planner.workload, world)
    first = planner.workload.training(1, world.size)[0]
    option = planner.step.option([first], zero_stage(settings), recompute=False)
    named = ("peak", "peak_operation", "waits", "mixed", "kernels", "copied", "collectives")
    return found | {
        "parameters": len(engine.trained),
        "gradients": gradients,
        "planned": option.bytes.total,
        **{name: getattr(trace, name) for name in named},
    }


def _step(engine: Engine[Any, Any], workload: Workload, world: World) -> None:
    """The engine's step on the first batch of the run."""
    users = workload.batches[0]
    batch = workload.collator.train(users, share(len(users), world.rank, world.size), 0)
    moved = [to_device(batch, world.device)]
    del batch
    engine.step(moved, total_rows=len(users), seed=1, lr=1e-4, status=RankStatus())


def _kind_counter(kinds: Counter[str]) -> Callable[[Tensor], None]:
    def count(gradient: Tensor) -> None:
        kinds[f"{gradient.dtype} on {gradient.device.type}"] += 1

    return count


def fake_model(config: RunConfig, num_items: int) -> LLM4Rec:
    """The system's model as `build_system` builds it, from shapes alone; under a `FakeTensorMode`."""
    system: Any = config.system
    variant, needed = variant_of(system), built_on(system)
    teacher = SASRec(SASRecConfig(name="sasrec"), num_items) if "teacher" in needed else None
    encoder: nn.Module | None = None
    if teacher and isinstance(system, ALLMRecConfig):
        width: int = ALLMRecStage1Config.model_fields["latent_dim"].default
        encoder = AutoEncoder(teacher.config.dim, width).encode.requires_grad_(False)
    frozen = FrozenParts(teacher, encoder, {})
    with (
        patch("trainer.nn.llm.backbone.read_model", _without_weights),
        patch("trainer.nn.llm.backbone.check_packing"),  # compares values, of which there are none
    ):
        reader = build_reader(load_llm(system.llm), variant, frozen, system.projector_init)
    return LLM4Rec(system, reader, build_distillation(variant, frozen))


def _without_weights(
    path: str, settings: PretrainedConfig, *, dtype: str, cure: str, attn_implementation: str
) -> PreTrainedModel:
    model: PreTrainedModel = AutoModel.from_config(
        settings, dtype=getattr(torch, dtype), attn_implementation=attn_implementation, trust_remote_code=False
    )
    return model
