"""Gaudi support through DeepSpeed's own HPU accelerator.

Habana's library needs the device; here a fake records the calls.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from deepspeed.accelerator.hpu_accelerator import HPU_Accelerator

from trainer import device, gaudi

GIB = 2**30
DETERMINISTIC: Any = torch.utils.deterministic


class Habana:
    """Fakes of the modules that the trainer and DeepSpeed import on a Gaudi."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        hpu = ModuleType("habana_frameworks.torch.hpu")
        core = ModuleType("habana_frameworks.torch.core")
        hccl = ModuleType("habana_frameworks.torch.distributed.hccl")
        utils = ModuleType("optimum.habana.utils")
        vars(hpu).update(
            max_memory_allocated=lambda: 3 * GIB,
            disable_dynamic_shape=lambda: self.calls.append("static"),
        )
        vars(core)["mark_step"] = lambda: self.calls.append("mark_step")
        vars(hccl)["initialize_distributed_hpu"] = lambda **who: self.calls.append(f"hccl {who}")
        # The keys of get_hpu_memory_stats in optimum-habana 1.21.2.
        stats = {"memory_allocated (GB)": 2.0, "max_memory_allocated (GB)": 3.0, "total_memory_available (GB)": 94.62}
        vars(utils)["get_hpu_memory_stats"] = lambda: stats
        torch_package = ModuleType("habana_frameworks.torch")
        vars(torch_package).update(hpu=hpu, core=core)
        self.modules = {module.__name__: module for module in (hpu, core, hccl, torch_package, utils)}
        above = ("habana_frameworks", "habana_frameworks.torch.distributed", "optimum", "optimum.habana")
        self.modules |= {name: ModuleType(name) for name in above}


@pytest.fixture
def habana(monkeypatch: pytest.MonkeyPatch) -> Iterator[Habana]:
    """Make this machine look like one with Gaudis."""
    library = Habana()
    for name, module in library.modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    before = torch.are_deterministic_algorithms_enabled(), DETERMINISTIC.fill_uninitialized_memory
    accelerator = HPU_Accelerator()  # enables deterministic algorithms globally, hence the restore below
    monkeypatch.setattr("deepspeed.accelerator.get_accelerator", lambda: accelerator)
    yield library
    torch.use_deterministic_algorithms(before[0])
    DETERMINISTIC.fill_uninitialized_memory = before[1]


def test_layers_become_graphs_by_default(habana: Habana, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PT_HPU_LAZY_MODE", raising=False)
    assert device.graph_backend() == "hpu_backend"
    gaudi.set_up(rank=9, local_rank=1, world_size=16)
    device.mark_step()
    assert habana.calls == ["hccl {'world_size': 16, 'rank': 9, 'local_rank': 1}"]


def test_lazy_mode_cuts_graphs_of_fixed_shapes(habana: Habana, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PT_HPU_LAZY_MODE", "1")
    assert device.graph_backend() is None
    gaudi.set_up(rank=0, local_rank=0, world_size=1)
    device.mark_step()
    assert habana.calls[1:] == ["static", "mark_step"]


def test_memory_is_read_from_the_device(habana: Habana) -> None:
    assert device.memory_gib() == {"peak": 3.0, "in_use": 2.0, "limit": 94.62}


def test_without_a_gaudi_habana_is_not_called() -> None:
    assert device.graph_backend() is None
    device.mark_step()
    assert device.memory_gib().keys() == {"peak"}
