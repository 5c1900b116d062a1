"""`engine.deterministic`: deterministic algorithms before the first operation, in flash-attn's kernel too."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import sasrec_config
from torch import Tensor

from trainer.config import parse_config
from trainer.nn.llm.attention import _flash_attn_varlen
from trainer.runs.preflight import preflight
from trainer.workflows import train

DETERMINISTIC: Any = torch.utils.deterministic


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    filled = DETERMINISTIC.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
    DETERMINISTIC.fill_uninitialized_memory = filled


class StartedError(Exception):
    """The rank would join the process group now."""


@pytest.mark.parametrize("deterministic", [False, True])
def test_it_is_chosen_before_the_process_group_starts(
    monkeypatch: pytest.MonkeyPatch, world: Path, tmp_path: Path, deterministic: bool
) -> None:
    found = []

    def start(*_: Any, **__: Any) -> None:
        found.append((torch.are_deterministic_algorithms_enabled(), os.environ.get("CUBLAS_WORKSPACE_CONFIG")))
        raise StartedError

    monkeypatch.setattr(train, "start", start)
    tree = sasrec_config(world, tmp_path / "run")
    tree["engine"]["deterministic"] = deterministic
    with pytest.raises(StartedError):
        train.train(preflight(parse_config(tree, "test"), 1))
    assert found == [(True, ":4096:8") if deterministic else (False, None)]


@dataclass
class Segments:
    """What the kernel reads of segments."""

    cu_query_E: Tensor
    cu_key_E: Tensor
    max_query: int = 2
    max_key: int = 2


@pytest.mark.parametrize("deterministic", [False, True])
def test_flash_attn_is_told(monkeypatch: pytest.MonkeyPatch, deterministic: bool) -> None:
    said: dict[str, Any] = {}
    library: Any = ModuleType("flash_attn")
    library.flash_attn_varlen_func = lambda query, *_, **more: said.update(more) or query
    monkeypatch.setitem(sys.modules, "flash_attn", library)
    torch.use_deterministic_algorithms(deterministic)
    x, segments = torch.ones(2, 1, 8), Segments(torch.tensor([0, 2]), torch.tensor([0, 2]))
    _flash_attn_varlen(x, x, x, segments, None, None)  # type: ignore[arg-type]
    assert said["deterministic"] == deterministic
