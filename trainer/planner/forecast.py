"""Forecast of a run's memory and time, and the settings with which it fits and runs fastest (formulas: `costs.py`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from statistics import fmean

from trainer.config import LLMConfig, RunConfig
from trainer.planner.costs import (
    Bytes,
    Load,
    backward_flops,
    forward_flops,
    linear_flops,
    rank_bytes,
    recompute_flops,
)
from trainer.planner.devices import Device
from trainer.planner.llm_shape import Adapters, LLMShape
from trainer.planner.overheads import LAUNCH_SECONDS, Running
from trainer.planner.traffic import NO_RINGS, Parts, Rings, Traffic, step_traffic
from trainer.planner.workload import Workload
from trainer.runs.batch_shares import num_steps, share_sizes

ELEMENT = {"float32": 4, "bfloat16": 2}
_USABLE_MEMORY = 0.9
"""Fraction of a device's memory that a run may use; the rest is for the device's runtime and fragmentation."""
_MATMUL, _STREAM = 0.65, 0.85
"""Fractions of their peaks that large matrix products and passes over memory are assumed to attain."""
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
    device_seconds: float
    """Seconds of the device and of the collectives, if the host keeps up."""
    launches: float
    """Kernels that the host launches in a step; 0: not counted on this device."""
    step_seconds: float
    """Seconds of the device, or of the host's launches if they take longer."""

    @property
    def launch_seconds(self) -> tuple[float, float]:
        """Shortest and longest estimate of the time that the host takes for its launches."""
        return LAUNCH_SECONDS[0] * self.launches, LAUNCH_SECONDS[1] * self.launches


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
    collation_seconds: float
    """Time that this machine takes to build a rank's batches of a step, in one thread."""
    dropout_seconds: tuple[float, float]
    """Time that the dropout of adapters adds to a step as configured, with one fused kernel per pass and without."""
    dropout_fused: bool
    """Which of them is part of the step's time."""
    quantized_speed: float
    """Speed of a step as configured relative to that with exact weights; 1 without quantization."""
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
        terms: all-gathers of the terms of the loss in a step.
        loss_bytes: memory of the loss of a global batch.
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
    terms: Rings = NO_RINGS
    loss_bytes: int = 0

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
    def running(self) -> Running:
        """How the LLM runs on this device. A compiler of graphs fuses the dropout, as Triton's kernel does."""
        fused = self.device.triton or self.llm.packing == "rows"
        return Running(self.shape, ELEMENT[self.llm.dtype], self.llm.quantization, self.adapters, fused)

    def evaluation_seconds(self, load: Load) -> float:
        """Seconds of running one batch without gradient and dropout, of the device or of the host's launches."""
        dropped = self.running.dropout_bytes(load)
        launched = self.running.forward_launches(load) * fmean(LAUNCH_SECONDS) if self.device.launched else 0.0
        return max(self._forward_seconds(load) - self._streaming(dropped), launched)

    def dropout_seconds(self, steps: Sequence[Sequence[Load]], *, fused: bool) -> float:
        """Seconds that the dropout of adapters adds to a step, if it is one kernel per pass (fused) or many."""
        running = replace(self.running, fused_dropout=fused)
        passes = 2 if len(steps[0]) == 1 else 3
        passes += self.llm.recompute
        return passes * fmean(sum(self._streaming(running.dropout_bytes(load)) for load in step) for step in steps)

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
        work = [[self._work(load, forwards, recompute) for load in step] for step in steps]
        flops, computing, launches = (fmean(sum(part[index] for part in step) for step in work) for index in range(3))
        device_seconds = computing + self._exchange_seconds(stage, micro_batches, recompute)
        launches = launches + self.running.step_launches() if self.device.launched else 0.0
        fits = memory.total + self.set_aside <= _USABLE_MEMORY * self.device.memory
        return Option(
            micro_batches,
            stage,
            recompute,
            memory,
            fits,
            step_flops=flops,
            device_seconds=device_seconds,
            launches=launches,
            step_seconds=max(device_seconds, launches * fmean(LAUNCH_SECONDS)),
        )

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
            loss=self.loss_bytes,
        )  # fmt: skip

    @property
    def one_byte(self) -> bool:
        """Whether the weights of linear layers take one byte each."""
        return self.llm.quantization != "none"

    def _work(self, load: Load, forwards: int, recompute: bool) -> tuple[float, float, float]:
        """FLOPs, seconds of the device and launches of the host for all passes over a micro-batch of a step."""
        forward, backward = (count(self.shape, load, self.adapters) for count in (forward_flops, backward_flops))
        recomputed = recompute_flops(self.shape, load, self.adapters) if recompute else 0.0
        seconds = forwards * self._forward_seconds(load) + (backward + recomputed) / self.rate
        running = self.running
        seconds += self._streaming(running.backward_bytes(load))
        launches = forwards * running.forward_launches(load) + running.backward_launches()
        if recompute:
            again = replace(load, frozen=0, frozen_pairs=0)
            seconds += self._streaming(running.forward_bytes(again))
            launches += running.forward_launches(again)
        return forwards * forward + recomputed + backward, seconds, launches

    def _forward_seconds(self, load: Load) -> float:
        """Seconds of the device for one forward pass in training."""
        seconds = forward_flops(self.shape, load, self.adapters) / self.rate - self._saved_by_fp8(load)
        return seconds + self._streaming(self.running.forward_bytes(load))

    def _saved_by_fp8(self, load: Load) -> float:
        """Seconds that the products of a forward pass take less in fp8, which has a higher peak."""
        if self.llm.quantization != "fp8" or self.device.fp8 is None:
            return 0.0
        attained = _MATMUL * self.device.flops[self.llm.dtype]
        return linear_flops(self.shape, load) / attained * (1 - 1 / self.device.fp8)

    def _streaming(self, moved: float) -> float:
        """Seconds of moving bytes between the device and its memory."""
        return moved / (_STREAM * self.device.bandwidth) if self.device.bandwidth else 0.0

    def _exchange_seconds(self, stage: int, micro_batches: int, recompute: bool) -> float:
        """Seconds of a step's collectives, without overlap; under ZeRO-3 the teacher is left out."""
        traffic = step_traffic(
            Parts.of(self.shape, ELEMENT[self.llm.dtype], self.trained, self.adapters),
            zero_stage=stage,
            micro_batches=micro_batches,
            streams=1 if self.adapters or self.llm.packing == "rows" else 2,
            recompute=recompute,
        )
        traffic = replace(traffic, terms=self.terms)
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
        steps = self._steps(micro_batches)
        configured = self.step.option(steps, zero_stage, recompute=self.step.llm.recompute)
        recommended = self._recommended()
        tokens, flops, seconds = self._validation()
        fused, unfused = (self.step.dropout_seconds(steps, fused=fused) for fused in (True, False))
        whole = [step[0] for step in self.workload.training(1, 1)]
        train = self.config.train
        per_epoch = num_steps(self.workload.dataset.manifest.num_train_users, train.batch_size)
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
            collation_seconds=self.workload.collation_seconds(micro_batches, self.step.ranks),
            dropout_seconds=(fused, unfused),
            dropout_fused=self.step.running.fused_dropout,
            quantized_speed=self._exact(steps, zero_stage) / configured.step_seconds,
            epoch_seconds=per_step * per_epoch,
            run_seconds=per_step * min(train.epochs * per_epoch, train.max_steps or math.inf),
        )

    def _exact(self, steps: Sequence[Sequence[Load]], zero_stage: int) -> float:
        """Seconds of a step as configured, but with exact weights."""
        llm = self.step.llm.model_copy(update={"quantization": "none"})
        return replace(self.step, llm=llm).option(steps, zero_stage, recompute=llm.recompute).step_seconds

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
        seconds = sum(self.step.evaluation_seconds(load) * times for load, times in batches)
        return tokens, flops, seconds / self.step.ranks
