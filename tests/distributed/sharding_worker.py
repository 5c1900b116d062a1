"""One rank: builds a ZeRO-3 engine, and fails if whole parameters are moved together or a buffer stays behind."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from trainer.config import TrainConfig
from trainer.config.deepspeed_json import load_deepspeed_json
from trainer.distributed import start, stop
from trainer.engine import sharding
from trainer.engine.engine import Engine

LAYERS, WIDTH = 4, 64


class Frozen(nn.Module):
    """Frozen layers with a trained one behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)).requires_grad_(False)
        self.head = nn.Linear(WIDTH, 2)
        self.register_buffer("table", torch.ones(3))


def main() -> None:
    train = TrainConfig(batch_size=2)
    world = start(threads=1)
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
    engine: Engine[Any, Any] = Engine(model, train, load_deepspeed_json("zero3", train, micro_batches=1), world)
    assert sum(moved) == 0, f"{moved} elements were moved to the device before they were sharded"
    assert buffers == ["table"]
    assert engine.zero_stage == 3
    for layer, whole in zip(model.layers, expected, strict=True):
        share = layer.weight.ds_tensor
        assert share.numel() == WIDTH * WIDTH // world.size
        assert torch.equal(share, whole.flatten().chunk(world.size)[world.rank])
    stop()


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
    os._exit(0)
