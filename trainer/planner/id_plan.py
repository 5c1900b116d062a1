"""The plan of a run of a system by id: its step is run once on a few users, and scaled to the run.

Such models have some million parameters, most of them in the item table, so what a step takes follows from the batch,
the length of the sequences and, with a softmax over the catalog, the number of items. All three are in the measurement.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from trainer.config import ConfigError, RunConfig
from trainer.data.reading.dataset import Dataset, open_dataset
from trainer.data.reading.shards import epoch_batches, read_validated
from trainer.models import AnySystem, build_system
from trainer.models.scoring import VectorScoring
from trainer.planner.devices import Device, DeviceKind, device
from trainer.planner.overheads import LAUNCH_SECONDS
from trainer.runs.batch_shares import num_steps, share_sizes

_MOST_USERS, _FEWEST_USERS = 64, 4
_SAMPLED_SCORES = 64 << 20
"""Scores of positions against all items that the measured step may hold: a softmax over the catalog holds them all."""
_USABLE_MEMORY = 0.9
_TRAINED_BYTES = 16
"""Bytes per trained parameter: the weight, its gradient and Adam's two moments, all fp32."""
_ADAM_BYTES = 28
"""Bytes that Adam reads and writes per parameter in a step."""


@dataclass(frozen=True)
class Measured:
    """Cost of a piece of work on this machine, independent of its speed."""

    flops: float
    """FLOPs of matrix products, convolutions and attention."""
    saved: float
    """Bytes that autograd keeps for the backward pass, without parameters."""
    operations: float
    """Operations that the host dispatches: about one kernel each."""

    def times(self, users: float) -> Measured:
        """The same for this many times as many users, whose operations are as many."""
        return Measured(self.flops * users, self.saved * users, self.operations)


@dataclass(frozen=True)
class IdForecast:
    """Memory and time of a run, per device with the largest share of a batch."""

    parameters: int
    trained_bytes: int
    """Parameters, gradients and Adam's moments, held by every device."""
    activation_bytes: float
    fits: bool
    step_flops: float
    step_operations: float
    """Operations that the host launches in a step; as many kernels."""
    step_seconds: float
    """Seconds of the device, or of the host's launches if they take longer and the device needs them."""
    steps_per_epoch: int
    validation_seconds: float
    epoch_seconds: float
    """Validations included."""
    run_seconds: float
    """Duration of the run if it does not stop early."""


@dataclass(frozen=True)
class IdPlan:
    """The forecast of a run on a number of devices of one kind."""

    config: RunConfig
    device: Device
    devices: int
    forecast: IdForecast


def plan_id_run(config: RunConfig, kind: DeviceKind, devices: int) -> IdPlan:
    """Plan a run of a system by id: it is built from the real dataset and takes a step with a few users.

    Raises:
        ValueError: the device has no rate for fp32.
    """
    chosen = device(kind, devices)
    if "float32" not in chosen.flops:
        raise ConfigError(f"no float32 rate is known for {chosen.name}, and {config.system.name} trains in float32")
    dataset = open_dataset(config.data.path, full_check=False)
    system = build_system(config, dataset)
    share = max(share_sizes(config.train.batch_size, devices))
    step = _step(config, dataset, system, share)
    parameters = sum(parameter.numel() for parameter in system.model.parameters() if parameter.requires_grad)
    streaming = _ADAM_BYTES * parameters / chosen.bandwidth if chosen.bandwidth else 0.0
    reduced = 2 * 4 * parameters * (devices - 1) / devices / chosen.link
    step_seconds = max(_seconds(step, chosen) + streaming + reduced, _launching(step.operations, chosen))
    validation = _validation_seconds(config, dataset, system, chosen) / devices
    per_epoch = num_steps(dataset.manifest.num_train_users, config.train.batch_size)
    per_step = step_seconds + validation / config.train.validate_every / per_epoch
    total = _TRAINED_BYTES * parameters + step.saved
    forecast = IdForecast(
        parameters=parameters,
        trained_bytes=_TRAINED_BYTES * parameters,
        activation_bytes=step.saved,
        fits=total <= _USABLE_MEMORY * chosen.memory,
        step_flops=step.flops,
        step_operations=step.operations,
        step_seconds=step_seconds,
        steps_per_epoch=per_epoch,
        validation_seconds=validation,
        epoch_seconds=per_step * per_epoch,
        run_seconds=per_step * min(config.train.epochs * per_epoch, config.train.max_steps or math.inf),
    )
    return IdPlan(config, chosen, devices, forecast)


def id_plan_text(plan: IdPlan) -> str:
    """Parameters, memory and time."""
    config, forecast, gb = plan.config, plan.forecast, 1e9
    total = forecast.trained_bytes + forecast.activation_bytes
    return (
        f"{config.system.name} on {config.data.path}: {forecast.parameters:,} trained parameters in float32\n"
        f"{plan.devices} x {plan.device.name}: {plan.device.flops['float32'] / 1e12:.3g} TFLOP/s peak, of which "
        f"{plan.device.achieved:.0%} is assumed\n\n"
        f"TFLOP   {forecast.step_flops / 1e12:,.3g} per step and device\n"
        f"time    {forecast.step_seconds:,.3g} s per step of {config.train.batch_size} users "
        f"({forecast.step_operations:,.0f} operations to launch); epoch of {forecast.steps_per_epoch:,} steps "
        f"{forecast.epoch_seconds:,.1f} s; whole run {forecast.run_seconds / 3600:,.2f} h, unless it stops early\n\n"
        f"memory per device: {total / gb:.2f} of {plan.device.memory / gb:.0f} GB, "
        f"{'fits' if forecast.fits else 'DOES NOT FIT: take more devices, or a smaller train.batch_size'}\n"
        f"  {'trained parts, gradients, Adam':32} {forecast.trained_bytes / gb:8.3f} GB\n"
        f"  {'activations':32} {forecast.activation_bytes / gb:8.3f} GB"
    )


def _step(config: RunConfig, dataset: Dataset, system: AnySystem, share: int) -> Measured:
    """The training step of a share of a global batch."""
    steps = epoch_batches(
        dataset.path, dataset.manifest, batch_size=config.train.batch_size, shuffle_shards=config.data.shuffle_shards,
        seed=config.seed, epoch=0,
    )  # fmt: skip
    [users] = islice(steps, 1)
    sampled = min(_users(config, dataset), share, len(users))
    batch = system.collator.train(users, slice(0, sampled), 0)
    model = system.model.train()
    work = measure(lambda: model.loss(model(batch)).total.backward(), set(model.parameters()))
    for parameter in model.parameters():
        parameter.grad = None
    return work.times(share / sampled)


def _validation_seconds(config: RunConfig, dataset: Dataset, system: AnySystem, chosen: Device) -> float:
    """Seconds of a validation on one device: users are encoded and scored against all item vectors at once."""
    scoring: VectorScoring[Any, Any] = system.vectors
    evaluation, manifest = config.evaluation, dataset.manifest
    histories, _ = read_validated(dataset.path, dataset.manifest).targets("valid")
    sample = histories.take(slice(0, _FEWEST_USERS))
    if not len(sample):
        return 0.0
    model = system.model.eval()

    def encode() -> None:
        with torch.no_grad():
            scoring.user_vectors(sample, torch.device("cpu"))

    work = measure(encode, set(model.parameters()))
    users = manifest.statistics.users_with_valid
    users = min(users, evaluation.valid_users or evaluation.users or users)
    batches = math.ceil(users / evaluation.batch_size)
    return max(_seconds(work.times(users / len(sample)), chosen), batches * _launching(work.operations, chosen))


def _users(config: RunConfig, dataset: Dataset) -> int:
    """Users of the measured step."""
    scores = getattr(config.system, "max_length", 128) * dataset.num_items
    return max(_FEWEST_USERS, min(_MOST_USERS, _SAMPLED_SCORES // scores))


def _seconds(work: Measured, chosen: Device) -> float:
    return work.flops / (chosen.flops["float32"] * chosen.achieved)


def _launching(operations: float, chosen: Device) -> float:
    return operations * fmean(LAUNCH_SECONDS) if chosen.launched else 0.0


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what is dispatched."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not any(word in func._schema.name for word in ("view", "detach", "empty", "transpose", "expand"))
        return func(*args, **(kwargs or {}))


def measure(work: Callable[[], object], parameters: set[Tensor]) -> Measured:
    """Run work once, and count.

    Args:
        parameters: tensors that exist anyway and are not counted as saved.
    """
    known = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    operations = _Operations()
    with (
        FlopCounterMode(display=False) as flops,
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        operations,
    ):
        work()
    return Measured(float(flops.get_total_flops()), float(sum(saved.values())), float(operations.count))
