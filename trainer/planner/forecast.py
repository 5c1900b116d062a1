"""Forecast of a run's memory and time, and the settings with which it fits and runs fastest (formulas: `costs.py`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import fmean

from trainer.config import LLMConfig, RunConfig
from trainer.planner.costs import Bytes, Load, backward_flops, forward_flops, rank_bytes, recompute_flops
from trainer.planner.devices import Device
from trainer.planner.llm_shape import Adapters, LLMShape
from trainer.planner.traffic import Parts, Traffic, step_traffic
from trainer.planner.workload import Workload
from trainer.runs.batch_shares import num_steps, share_sizes

ELEMENT = {"float32": 4, "bfloat16": 2}
_USABLE_MEMORY = 0.9
"""Fraction of a device's memory that a run may use; the rest is for the device's runtime and fragmentation."""
_STAGES = (1, 3)  # ZeRO-2 saves next to nothing over ZeRO-1 with so few trained parameters


@dataclass(frozen=True)
class Option:
    """One way to run a training step, and its cost on the rank with the largest share."""

    micro_batches: int
    zero_stage: int
    recompute: bool
    bytes: Bytes
    fits: bool
    step_flops: float
    step_seconds: float


@dataclass(frozen=True)
class Forecast:
    """Memory, tokens and time of a run."""

    as_configured: Option
    recommended: Option | None
    """The fastest option that fits; None: nothing fits."""
    trained_parameters: int
    useful_tokens: float
    """Tokens of the prompts of a step, over all ranks; mean of the sampled steps."""
    frozen_tokens: float
    """Tokens run without gradient in a step, over all ranks; mean of the sampled steps."""
    trained_tokens: float
    """Tokens run with gradient in a step, over all ranks; mean of the sampled steps."""
    steps_per_epoch: int
    validation_tokens: float
    """Tokens run in a validation, over all ranks."""
    validation_flops: float
    """FLOPs of a validation, over all ranks."""
    validation_seconds: float
    epoch_seconds: float
    """Duration of an epoch with the recommended settings (or else as configured), validations included."""
    run_seconds: float
    """Duration of the run if it does not stop early."""


@dataclass(frozen=True)
class StepPlanner:
    """Estimates the memory and time of a training step on one kind of device.

    Args:
        trained: number of trained parameters.
        ranks: number of devices, each with a full copy of what ZeRO does not shard.
        exchange: maps a step's traffic to seconds. None: bytes over the device's link, without latency.
        set_aside: bytes of a device's memory that steps cannot use.

    Raises:
        ValueError: the device's rate in the LLM's dtype, or in fp8 if that is configured, is not known.
    """

    shape: LLMShape
    llm: LLMConfig
    trained: int
    device: Device
    ranks: int
    adapters: Adapters | None = None
    exchange: Callable[[Traffic], float] | None = None
    set_aside: int = 0

    def __post_init__(self) -> None:
        if self.llm.dtype not in self.device.flops:
            known = " or ".join(sorted(self.device.flops))
            raise ValueError(f"no {self.llm.dtype} rate is known for {self.device.name}: set system.llm.dtype={known}")
        if self.llm.quantization == "fp8" and self.device.fp8 is None:
            raise ValueError(f"no fp8 rate is known for {self.device.name}: set system.llm.quantization=none (or int8)")

    @property
    def rate(self) -> float:
        """Expected FLOP/s: the achieved fraction of the peak."""
        return self.device.flops[self.llm.dtype] * self.device.achieved

    @property
    def forward_rate(self) -> float:
        """Expected FLOP/s of forward passes, the only passes that use fp8."""
        return self.rate * (self.device.fp8 or 1.0) if self.llm.quantization == "fp8" else self.rate

    def option(self, steps: Sequence[Sequence[Load]], stage: int, *, recompute: bool) -> Option:
        """Cost of a step: the mean time and the peak memory of the sampled steps.

        Args:
            steps: for each sampled step, the micro-batches of the rank with the largest share.
        """
        micro_batches = len(steps[0])
        parts = [self.bytes(load, stage, recompute=recompute) for step in steps for load in step]
        memory = max(parts, key=lambda part: part.total)
        # With micro-batches a first pass without gradient computes the terms of the global batch (GradCache).
        forwards = 1 if micro_batches == 1 else 2
        work = [[self._flops(load, forwards, recompute) for load in step] for step in steps]
        forward, backward = (fmean(sum(part[index] for part in step) for step in work) for index in (0, 1))
        computing = forward / self.forward_rate + backward / self.rate
        seconds = computing + self._exchange_seconds(stage, micro_batches, recompute)
        fits = memory.total + self.set_aside <= _USABLE_MEMORY * self.device.memory
        return Option(micro_batches, stage, recompute, memory, fits, forward + backward, seconds)

    def fastest(
        self, steps_of: Callable[[int], Sequence[Sequence[Load]]], counts: Iterable[int], stages: Iterable[int]
    ) -> Option | None:
        """The fastest option that fits, among these numbers of micro-batches and ZeRO stages.

        Recomputing costs about one more forward pass, so it is chosen only if nothing fits without it. Every number of
        micro-batches above one costs the same second forward pass, so the smallest that fits is taken.
        """
        fitting = []
        for recompute, stage in product((False, True), stages):
            options = (self.option(steps_of(count), stage, recompute=recompute) for count in sorted(counts))
            fitting += [option for option in [next((o for o in options if o.fits), None)] if option]
        return min(fitting, key=lambda option: option.step_seconds, default=None)

    def bytes(self, load: Load, stage: int, *, recompute: bool) -> Bytes:
        """Peak memory of a rank that runs this micro-batch."""
        return rank_bytes(
            self.shape, load, element=ELEMENT[self.llm.dtype], trained_parameters=self.trained, zero_stage=stage,
            devices=self.ranks, one_byte=self.one_byte, recompute=recompute, adapters=self.adapters,
        )  # fmt: skip

    @property
    def one_byte(self) -> bool:
        """Whether the weights of linear layers take one byte each."""
        return self.llm.quantization != "none"

    def _flops(self, load: Load, forwards: int, recompute: bool) -> tuple[float, float]:
        """FLOPs of the forward passes, recomputation included, and of the backward pass."""
        recomputation = recompute_flops(self.shape, load, self.adapters) if recompute else 0.0
        forward, backward = (count(self.shape, load, self.adapters) for count in (forward_flops, backward_flops))
        return forwards * forward + recomputation, backward

    def _exchange_seconds(self, stage: int, micro_batches: int, recompute: bool) -> float:
        """Seconds of a step's collectives, without overlap; the teacher and the terms of the loss are left out."""
        traffic = step_traffic(
            Parts.of(self.shape, ELEMENT[self.llm.dtype], self.trained, self.adapters),
            zero_stage=stage,
            micro_batches=micro_batches,
            streams=1 if self.adapters or self.llm.packing == "rows" else 2,
            recompute=recompute,
        )
        if self.exchange:
            return self.exchange(traffic)
        return traffic.sent(self.ranks) / self.device.link


@dataclass(frozen=True)
class Planner:
    """Forecasts one run."""

    config: RunConfig
    step: StepPlanner
    workload: Workload

    def forecast(self, micro_batches: int, zero_stage: int) -> Forecast:
        """Forecast the run; the arguments are those of its configuration."""
        configured = self.step.option(self._steps(micro_batches), zero_stage, recompute=self.step.llm.recompute)
        recommended = self._recommended()
        tokens, flops, seconds = self._validation()
        whole = [step[0] for step in self.workload.training(1, 1)]
        train = self.config.train
        per_epoch = num_steps(self.workload.dataset.manifest.num_users, train.batch_size)
        per_step = (recommended or configured).step_seconds + seconds / train.validate_every / per_epoch
        return Forecast(
            as_configured=configured,
            recommended=recommended,
            trained_parameters=self.step.trained,
            useful_tokens=fmean(load.useful for load in whole),
            frozen_tokens=fmean(load.frozen for load in whole),
            trained_tokens=fmean(load.trained for load in whole),
            steps_per_epoch=per_epoch,
            validation_tokens=tokens,
            validation_flops=flops,
            validation_seconds=seconds,
            epoch_seconds=per_step * per_epoch,
            run_seconds=per_step * min(train.epochs * per_epoch, train.max_steps or math.inf),
        )

    def _recommended(self) -> Option | None:
        """The fastest option that fits; None: nothing fits."""
        share = max(share_sizes(self.config.train.batch_size, self.step.ranks))
        counts = {math.ceil(share / users) for users in range(1, share + 1)}
        return self.step.fastest(self._steps, counts, self._stages())

    def _steps(self, micro_batches: int) -> list[list[Load]]:
        return self.workload.training(micro_batches, self.step.ranks)

    def _stages(self) -> tuple[int, ...]:
        """ZeRO stages to try: one device cannot shard, and ZeRO-3 does not shard quantized weights either."""
        return _STAGES[:1] if self.step.ranks == 1 or self.step.one_byte else _STAGES

    def _validation(self) -> tuple[float, float, float]:
        """Tokens and FLOPs of a validation over all ranks, and its seconds."""
        batches = self.workload.validation()
        tokens = sum(load.run * times for load, times in batches)
        flops = sum(forward_flops(self.step.shape, load, self.step.adapters) * times for load, times in batches)
        return tokens, flops, flops / self.step.ranks / self.step.forward_rate
