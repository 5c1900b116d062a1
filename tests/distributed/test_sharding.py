"""Weights when a run starts: frozen ones are not broadcast, and models that do not fit on one device never whole."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import run_ranks
from torch import Tensor, nn

from trainer.engine.sharding import streamed


def test_engines_start_without_a_broadcast_of_frozen_weights_and_step_with_one_read() -> None:
    run_ranks(2, Path(__file__).with_name("sharding_worker.py"), [])


@pytest.fixture
def most_copied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """`Tensor.to` copies, as between devices; the bytes of copies that live after each copy."""
    live: dict[int, int] = {}  # bytes of storages
    history: list[int] = []

    def copy(tensor: Tensor, *_: Any, **__: Any) -> Tensor:
        copied = tensor.clone()
        storage = copied.untyped_storage()
        live[storage._cdata] = storage.nbytes()
        weakref.finalize(storage, live.pop, storage._cdata)
        history.append(sum(live.values()))
        return copied

    monkeypatch.setattr(torch.Tensor, "to", copy)
    return history


def test_a_streamed_model_is_on_the_device_one_module_at_a_time(most_copied: list[int]) -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(5)))
    x = torch.randn(2, 8)
    expected, places = model(x).detach(), [parameter.data_ptr() for parameter in model.parameters()]
    with torch.no_grad(), streamed(model, torch.device("cpu")):
        assert torch.equal(model(x), expected)
        assert torch.equal(model(x), expected)
        model[0].weight.zero_()
    assert [parameter.data_ptr() for parameter in model.parameters()] == places
    assert len(most_copied) == 10
    assert max(most_copied) == 8 * 8 * 4
    assert not model(x).any(), "the weights on the host are the model's, and no hook is left"
