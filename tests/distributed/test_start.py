"""The start of a rank: the device, the rendezvous and the first collective, each refused with its cure."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer import device, distributed
from trainer.config import ConfigError
from trainer.device import check_accelerator, nvidia_driver
from trainer.distributed import _device_index, _meet, _try_collective
from trainer.runs.launch_env import free_port

TOO_OLD = "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver by ..."


@pytest.fixture
def unusable_cuda(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A torch for CUDA 13 on a node with an old driver."""

    def init() -> None:
        raise RuntimeError(TOO_OLD)

    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(device, "_DRIVER_FILE", tmp_path / "version")
    (tmp_path / "version").write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.57.02  Tue Jul 13 16:14:05 UTC 2021\nGCC version: 9.3\n"
    )


@pytest.mark.parametrize("chosen", [None, "cuda"])
def test_a_gpu_that_cannot_be_used_is_refused(
    unusable_cuda: None, monkeypatch: pytest.MonkeyPatch, chosen: str | None
) -> None:
    if chosen:
        monkeypatch.setenv("DS_ACCELERATOR", chosen)
    with pytest.raises(ConfigError, match=r"is built for CUDA 13\.0 and finds no usable GPU") as caught:
        distributed.start()
    message = str(caught.value)
    assert "is too old (found version 11040); driver: 470.57.02" in message
    assert "docs/clusters.md" in message
    assert "set DS_ACCELERATOR=cpu" in message
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    check_accelerator()


def test_a_cpu_build_is_no_error_unless_cuda_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    check_accelerator()
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    with pytest.raises(ConfigError, match="is built without CUDA: install the torch of a CUDA index"):
        check_accelerator()


def test_no_driver_has_no_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(device, "_DRIVER_FILE", tmp_path / "none")
    assert nvidia_driver() == ""


def test_ranks_find_their_gpu_also_where_each_sees_only_its_own() -> None:
    assert [_device_index(rank, 4) for rank in range(4)] == [0, 1, 2, 3]
    assert [_device_index(rank, 1) for rank in range(4)] == [0, 0, 0, 0]
    with pytest.raises(ConfigError, match=r"local rank 2 sees 2 GPUs: start at most 2 ranks per node .*--num_gpus 2"):
        _device_index(2, 2)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_missing_rank_is_reported_before_the_time_out_of_collectives(
    monkeypatch: pytest.MonkeyPatch, rank: str
) -> None:
    monkeypatch.setattr(distributed, "_PATIENCE", timedelta(seconds=1))
    for name, value in {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    start = time.monotonic()
    with pytest.raises(ConnectionError, match=r"the ranks cannot connect at 127\.0\.0\.1:\d+ .*a rank did not start"):
        _meet("gloo", timedelta(hours=1))
    assert time.monotonic() - start < 30


def _failing(*_: Any) -> None:
    raise RuntimeError("NCCL error: Duplicate GPU detected : rank 1 and rank 0\nmore")


@pytest.mark.parametrize(
    ("collective", "reason"),
    [(lambda *_: time.sleep(60), "no answer in 0 s"), (_failing, "Duplicate GPU detected : rank 1 and rank 0")],
    ids=["hangs", "fails"],
)
def test_a_first_collective_that_cannot_work_names_its_cures(
    monkeypatch: pytest.MonkeyPatch, collective: Any, reason: str
) -> None:
    monkeypatch.setattr(torch.distributed, "all_reduce", collective)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: "nccl")
    with pytest.raises(ConnectionError) as caught:
        _try_collective(torch.device("cpu"), timedelta(seconds=0.2))
    for word in ("first all-reduce over nccl", reason, "NCCL_SOCKET_IFNAME", "NCCL_P2P_DISABLE=1"):
        assert word in str(caught.value)
