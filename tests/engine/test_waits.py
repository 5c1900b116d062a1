"""Where a rank may wait for others it says so, also on accelerators, which only enqueue collectives."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from trainer import distributed
from trainer.device import Stopwatch
from trainer.distributed import World
from trainer.engine import watchdog
from trainer.engine.engine import Engine
from trainer.models.interface import Losses
from trainer.workflows.setup import raise_on_all_ranks


class Terms(NamedTuple):
    loss_B: Tensor


@pytest.fixture
def world() -> World:
    return World(0, 2, torch.device("cpu"))


def _engine(world: World, model: Any) -> Engine[Any, Any]:
    """The parts of an engine that the loss and the optimizer step use."""
    engine: Any = object.__new__(Engine)
    engine.world, engine._model, engine.deepspeed = world, model, model
    engine._forward_time = Stopwatch()
    engine._forward_time.start()
    return engine  # type: ignore[no-any-return]


def test_the_loss_is_computed_as_one_who_waits(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """An accelerator only enqueues the gathers: a loss that reads a value waits there for the other ranks."""
    said = []

    class Model:
        def loss(self, terms: Terms) -> Losses:
            said.append(world.heartbeat.waiting)
            return Losses(terms.loss_B.sum(), {})

    monkeypatch.setattr(World, "all_gather_rows", lambda self, local, sizes: local)
    _engine(world, Model())._global_loss(Terms(torch.ones(2)), [1, 1])
    assert said == [True]
    assert not world.heartbeat.waiting


class Values:
    """Rows on an accelerator: reading one waits for the ranks that have to send them."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.said: list[bool] = []

    def tolist(self) -> list[float]:
        self.said.append(self.world.heartbeat.waiting)
        return [0.0, 0.0]


def test_values_are_read_as_one_who_waits(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    values = Values(world)
    monkeypatch.setattr(World, "all_gather_rows", lambda self, local, sizes: values)
    world.all_gather_value(1.0)
    monkeypatch.setattr(distributed, "wait_for_device", values.tolist)
    world.all_gather_results(torch.ones(1), [1, 1])
    assert values.said == [True, True]


def test_ranks_agree_on_a_start_as_those_who_wait(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    said = []
    monkeypatch.setattr(torch.distributed, "all_gather_object", lambda *_: said.append(world.heartbeat.waiting))
    raise_on_all_ranks(world, None)
    assert said == [True]


def test_a_stuck_rank_leaves_its_last_collectives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = torch._C._distributed_c10d
    monkeypatch.setattr(trace, "_dump_nccl_trace", lambda: b"last collectives", raising=False)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: "gloo")
    watchdog._dump_collectives(tmp_path / "trace")
    assert not (tmp_path / "trace").exists()
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: "nccl")
    watchdog._dump_collectives(tmp_path / "trace")
    assert (tmp_path / "trace").read_bytes() == b"last collectives"
