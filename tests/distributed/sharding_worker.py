"""One rank: builds engines, and fails if frozen weights are broadcast, are whole under ZeRO-3 or differ unnoticed.

It also fails if a step reads more values of tensors than it should.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import deepspeed
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.config import ConfigError, TrainConfig
from trainer.config.deepspeed_json import load_deepspeed_json
from trainer.distributed import World, start, stop
from trainer.engine import sharding
from trainer.engine.engine import Engine
from trainer.engine.rank_status import RankStatus
from trainer.models.interface import Losses

LAYERS, WIDTH = 4, 64
TRAIN = TrainConfig(batch_size=2)


class Terms(NamedTuple):
    """One row per user, and a fact about the global batch."""

    loss_B: Tensor
    users: int


class Frozen(nn.Module):
    """Frozen layers with a trained one behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)).requires_grad_(False)
        self.head = nn.Linear(WIDTH, 2)
        self.register_buffer("table", torch.ones(3))

    def forward(self, x_BD: Tensor) -> Terms:
        for layer in self.layers:
            x_BD = layer(x_BD)
        return Terms(self.head(x_BD).square().sum(-1), 2)

    def loss(self, terms: Terms) -> Losses:
        total = terms.loss_B.sum() / terms.users
        return Losses(total, {"square": total.detach()})


class Reads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes where a value of a tensor is read, other than in `tolist`; torch's optimizers read their own counters."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            frames = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_stack()[:-1]]
            if not any("torch/optim" in frame for frame in frames):
                self.found.append(next(frame for frame in reversed(frames) if "/torch/" not in frame))
        return func(*args, **(kwargs or {}))


@contextmanager
def broadcasts() -> Iterator[list[int]]:
    """Collects the bytes of DeepSpeed's broadcasts."""
    sizes: list[int] = []
    broadcast = deepspeed.comm.broadcast

    def recording(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(tensor.nbytes)
        return broadcast(tensor, *args, **kwargs)

    deepspeed.comm.broadcast = recording
    try:
        yield sizes
    finally:
        deepspeed.comm.broadcast = broadcast


def engine_of(model: Any, settings: str, world: World) -> Engine[Any, Any]:
    """A new engine; fails if it broadcasts other than the trained parameters, and if these do not become rank 0's."""
    with torch.no_grad():
        model.head.weight += world.rank  # as ranks would differ that were seeded differently
    expected = {name: p.detach().clone() for name, p in model.head.named_parameters()}
    expected["weight"] -= world.rank
    trained = sum(p.nbytes for p in model.head.parameters())
    with broadcasts() as sizes:
        engine: Engine[Any, Any] = Engine(model, TRAIN, load_deepspeed_json(settings, TRAIN, micro_batches=1), world)
    # ZeRO may send trained parameters again, in its own buffers.
    assert trained <= sum(sizes) < trained + WIDTH * WIDTH * 4, sizes
    if engine.zero_stage < 3:
        torch.testing.assert_close(dict(model.head.named_parameters()), expected)
    return engine


def check_sharding(world: World) -> None:
    """ZeRO-3 shards one parameter after the other, and leaves no buffer behind."""
    moved: list[int] = []
    buffers: list[str] = []
    to, move_buffers = nn.Module.to, sharding._move_buffers

    def recording_to(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        moved.append(sum(p.numel() for p in self.parameters()))
        return to(self, *args, **kwargs)

    def recording_buffers(model: Any, device: torch.device) -> None:
        move_buffers(model, device)
        buffers.extend(name for name, buffer in model.named_buffers() if buffer.device == device)

    nn.Module.to = recording_to  # type: ignore[method-assign]
    sharding._move_buffers = recording_buffers
    model: Any = Frozen()
    expected = [layer.weight.clone() for layer in model.layers]
    engine = engine_of(model, "zero3", world)
    nn.Module.to = to  # type: ignore[method-assign]
    sharding._move_buffers = move_buffers
    assert sum(moved) == 0, f"{moved} elements were moved to the device before they were sharded"
    assert buffers == ["table"]
    assert engine.zero_stage == 3
    for layer, whole in zip(model.layers, expected, strict=True):
        share = layer.weight.ds_tensor
        assert share.numel() == WIDTH * WIDTH // world.size
        assert torch.equal(share, whole.flatten().chunk(world.size)[world.rank])


def check_differences(world: World) -> None:
    """A weight that one rank has read differently is named on every rank."""
    for settings in ("zero1", "zero3"):
        model: Any = Frozen()
        with torch.no_grad():
            model.layers[2].weight[0, 0] += 1e-6 * (world.rank == 1)
        said = r"rank 1 has read other frozen weights than rank 0 \(1 of 4 tensors, the first is layers.2.weight\)"
        with pytest.raises(ConfigError, match=said):
            Engine(model, TRAIN, load_deepspeed_json(settings, TRAIN, micro_batches=1), world)


def check_reads(world: World) -> None:
    """A step reads all its values together, and reports the loss and the norm of the averaged gradient."""
    for settings in ("zero0", "zero1", "zero2"):
        model: Any = Frozen()
        engine = engine_of(model, settings, world)
        x_BD = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(1))
        expected = model.loss(model(x_BD)).total
        gradients = torch.autograd.grad(expected, list(model.head.parameters()))
        with Reads() as reads:
            share_1D = x_BD[world.rank : world.rank + 1]
            report = engine.step([share_1D], total_rows=2, seed=0, lr=1e-3, status=RankStatus(signal=3 * world.rank))
        assert not reads.found, (settings, reads.found)
        torch.testing.assert_close(torch.tensor(report.loss), expected.detach())
        assert report.parts == {"square": report.loss}
        torch.testing.assert_close(torch.tensor(report.grad_norm), torch.nn.utils.get_total_norm(gradients))
        assert [status.signal for status in report.ranks] == [0, 3]


def main() -> None:
    """Run all checks in one process group."""
    world = start(threads=1)
    check_sharding(world)
    check_reads(world)
    check_differences(world)
    stop()


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
    os._exit(0)
