"""The start of a rank: the device, the rendezvous and the first collective, each refused with its cure."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch

from trainer import device, distributed
from trainer.config import ConfigError
from trainer.device import check_accelerator, describe_software, nvidia_driver
from trainer.distributed import _asked_threads, _device_index, _meet, _try_collective
from trainer.runs.launch_env import free_port, set_library_defaults

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


def test_a_laptop_with_torch_for_cuda_trains_on_its_cpu_and_a_job_does_not(
    unusable_cuda: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(device, "_DRIVER_FILE", tmp_path / "none")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    check_accelerator()
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with pytest.raises(ConfigError, match="driver: none"):
        check_accelerator()


def test_the_log_names_torch_cuda_and_driver(unusable_cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "accelerator", lambda: "cuda")
    monkeypatch.setattr(device, "describe", lambda: "NVIDIA H200")
    assert describe_software() == f"NVIDIA H200, torch {torch.__version__}, CUDA 13.0, driver 470.57.02"
    monkeypatch.setattr(device, "accelerator", lambda: "cpu")
    assert describe_software() == f"NVIDIA H200, torch {torch.__version__}"


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


class OneGpu:
    """DeepSpeed's accelerator on a site that binds one GPU per task."""

    chosen = -1

    def device_name(self, index: int | None = None) -> str:
        return "cuda" if index is None else f"cuda:{index}"

    def device_count(self) -> int:
        return 1

    def set_device(self, index: int) -> None:
        self.chosen = index


def test_an_accelerator_gets_its_threads_and_the_gpu_of_its_task(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, before = OneGpu(), torch.get_num_threads()
    monkeypatch.setattr(deepspeed.accelerator, "get_accelerator", lambda: gpu)
    for name, value in {"RANK": "2", "LOCAL_RANK": "2", "WORLD_SIZE": "4", "DS_ACCELERATOR": "cpu"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    try:
        world = distributed.start(threads=before + 2)
        assert torch.get_num_threads() == before + 2
    finally:
        torch.set_num_threads(before)
    assert (world.device, gpu.chosen, os.environ["LOCAL_RANK"]) == (torch.device("cuda:0"), 0, "0")


def test_defaults_of_libraries_leave_what_the_user_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "TORCH_FR_BUFFER_SIZE")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    set_library_defaults()
    assert [os.environ.get(name) for name in names] == [None, "expandable_segments:True", "2000"]
    chosen = {"PYTORCH_ALLOC_CONF": "backend:native", "TORCH_FR_BUFFER_SIZE": "7"}
    monkeypatch.setattr(os, "environ", dict(chosen))
    set_library_defaults()
    assert os.environ == chosen


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


@pytest.mark.parametrize(("value", "threads"), [("3", 3), ("4,2", 4), ("", 0), ("many", 0)])
def test_threads_of_the_environment_are_kept(monkeypatch: pytest.MonkeyPatch, value: str, threads: int) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert _asked_threads() == threads
