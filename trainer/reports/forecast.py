"""Memory and time of a run before it starts, and the settings that make it fit and fast (formulas: `costs.py`)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from statistics import fmean

from trainer.config import LLMConfig, RunConfig
from trainer.data.plan import num_steps, share_sizes
from trainer.reports.costs import Bytes, Load, backward_flops, forward_flops, rank_bytes, recompute_flops
from trainer.reports.devices import Device
from trainer.reports.llm_shape import Adapters, LLMShape
from trainer.reports.workload import Workload

ELEMENT = {"float32": 4, "bfloat16": 2}
_FILL = 0.9
"""Of a device's memory; the rest is for its runtime and for fragments."""
_STAGES = (1, 3)  # ZeRO-2 saves next to nothing over ZeRO-1 where so little is trained


@dataclass(frozen=True)
class Option:
    """One way to run a step, and what it takes on the rank with the largest share."""

    micro_batches: int
    zero_stage: int
    recompute: bool
    bytes: Bytes
    fits: bool
    step_flops: float
    step_seconds: float


@dataclass(frozen=True)
class Forecast:
    """What a run will take."""

    as_configured: Option
    recommended: Option | None
    """The fastest that fits; None: nothing does."""
    trained_parameters: int
    useful_tokens: float
    """Of a step of all ranks, mean."""
    frozen_tokens: float
    trained_tokens: float
    steps_per_epoch: int
    validation_tokens: float
    validation_flops: float
    """Of all ranks."""
    validation_seconds: float
    epoch_seconds: float
    """With the recommended settings (or else as configured), validations included."""
    run_seconds: float
    """Unless it stops early."""


@dataclass(frozen=True)
class Planner:
    """Foretells one run on one kind of device.

    Args:
        trained: trained parameters.
        ranks: devices, each with a whole copy of what ZeRO does not split.

    Raises:
        ValueError: the device's rate at the LLM's dtype is not known.
    """

    config: RunConfig
    shape: LLMShape
    llm: LLMConfig
    trained: int
    device: Device
    ranks: int
    workload: Workload
    adapters: Adapters | None = None

    def __post_init__(self) -> None:
        if self.llm.dtype not in self.device.flops:
            known = " or ".join(sorted(self.device.flops))
            raise ValueError(
                f"no rate of {self.device.name} is known in {self.llm.dtype}: set system.llm.dtype={known}"
            )

    def forecast(self, micro_batches: int, zero_stage: int) -> Forecast:
        """What the run takes; the arguments are what its configuration has."""
        configured, recommended = self._option(micro_batches, zero_stage, self.llm.recompute), self._recommended()
        tokens, flops, seconds = self._validation()
        whole = [step[0] for step in self.workload.training(1, 1)]
        train = self.config.train
        per_epoch = num_steps(self.workload.dataset.manifest.num_users, train.batch_size)
        per_step = (recommended or configured).step_seconds + seconds / train.validate_every / per_epoch
        return Forecast(
            as_configured=configured,
            recommended=recommended,
            trained_parameters=self.trained,
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

    def _option(self, micro_batches: int, stage: int, recompute: bool) -> Option:
        steps = self.workload.training(micro_batches, self.ranks)
        parts = [self._bytes(load, stage, recompute) for step in steps for load in step]
        memory = max(parts, key=lambda part: part.total)
        # With micro-batches a first pass without gradient computes the terms of the whole batch (GradCache).
        forwards = 1 if micro_batches == 1 else 2
        flops = fmean(sum(self._step_flops(load, forwards, recompute) for load in step) for step in steps)
        at_once = self.adapters or self.llm.packing == "rows"  # else tokens without gradient run first
        runs = forwards if at_once else 2 * forwards
        gathers = micro_batches * (runs + 1 + recompute) if stage == 3 else 0
        seconds = flops / self._rate() + self._exchange_seconds(stage, gathers)
        fits = memory.total <= _FILL * self.device.memory
        return Option(micro_batches, stage, recompute, memory, fits, flops, seconds)

    def _recommended(self) -> Option | None:
        """The fastest that fits.

        Recomputing costs about a forward pass, so it is chosen only where nothing fits without. Every number of
        micro-batches above one costs the same second forward pass, so the smallest that fits is taken.
        """
        share = max(share_sizes(self.config.train.batch_size, self.ranks))
        counts = sorted({math.ceil(share / users) for users in range(1, share + 1)})
        fitting = []
        for recompute, stage in product((False, True), self._stages()):
            options = (self._option(count, stage, recompute) for count in counts)
            fitting += [option for option in [next((o for o in options if o.fits), None)] if option]
        return min(fitting, key=lambda option: option.step_seconds, default=None)

    def _stages(self) -> tuple[int, ...]:
        """One device has nobody to split with, and under ZeRO-3 int8 weights stay whole all the same."""
        return _STAGES[:1] if self.ranks == 1 or self._int8 else _STAGES

    @property
    def _int8(self) -> bool:
        return self.llm.quantization == "int8"

    def _validation(self) -> tuple[float, float, float]:
        """Tokens and FLOPs of all ranks, and seconds."""
        batches = self.workload.validation()
        tokens = sum(load.run * times for load, times in batches)
        flops = sum(forward_flops(self.shape, load, self.adapters) * times for load, times in batches)
        return tokens, flops, flops / self.ranks / self._rate()

    def _bytes(self, load: Load, stage: int, recompute: bool) -> Bytes:
        return rank_bytes(
            self.shape, load, element=ELEMENT[self.llm.dtype], trained_parameters=self.trained, zero_stage=stage,
            devices=self.ranks, int8=self._int8, recompute=recompute, adapters=self.adapters,
        )  # fmt: skip

    def _step_flops(self, load: Load, forwards: int, recompute: bool) -> float:
        again = recompute_flops(self.shape, load, self.adapters) if recompute else 0.0
        forward, backward = (count(self.shape, load, self.adapters) for count in (forward_flops, backward_flops))
        return forwards * forward + again + backward

    def _rate(self) -> float:
        return self.device.flops[self.llm.dtype] * self.device.achieved

    def _exchange_seconds(self, stage: int, gathers: int) -> float:
        """As if nothing overlapped. All-reduce of the fp32 gradients, under ZeRO all-gather of the updated parts, under
        ZeRO-3 all-gathers of the LLM too; `tests/distributed/test_traffic.py` counts the bytes.
        """
        others = (self.ranks - 1) / self.ranks
        trained = (3 if stage else 2) * 4 * self.trained
        weights = gathers * self.shape.weight_bytes(ELEMENT[self.llm.dtype], int8=self._int8)
        return others * (trained + weights) / self.device.link
