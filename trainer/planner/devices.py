"""Devices to plan for: rates, memory and links, each with its source."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from trainer.config import LLMConfig

DeviceKind = Literal["a6000", "h100", "h200", "gaudi2", "cpu"]


@dataclass(frozen=True)
class Device:
    """One accelerator, or one rank's share of this machine's cores."""

    name: str
    flops: Mapping[str, float]
    """Peak FLOP/s of dense matrix products, by dtype."""
    achieved: float
    """Expected fraction of the peak when training around a frozen LLM."""
    basis: str
    """Source of `achieved`."""
    memory: int
    """Memory in bytes."""
    link: float
    """Bandwidth between ranks of one node, in bytes per second."""
    bandwidth: float | None = None
    """Peak memory bandwidth, in bytes per second; None: passes over memory are not counted."""
    varlen: bool = False
    """Whether it has a kernel for attention over sequences of different lengths, in bf16."""
    fp8: float | None = None
    """Peak rate of matrix products in fp8 over that in bf16; None: not supported, or unknown."""
    launched: bool = False
    """Whether the host launches each kernel on its own, in eager mode. A Gaudi's graphs and a CPU are not counted."""
    triton: bool = False
    """Whether Triton's kernels run on it."""

    def joins_segments(self, llm: LLMConfig) -> bool:
        """Whether the LLM's attention runs in that kernel (`varlen_kernel` in `trainer/nn/llm/attention.py`)."""
        return self.varlen and llm.dtype == "bfloat16" and llm.packing == "stream"


_TABLE: dict[DeviceKind, Device] = {
    # NVIDIA's datasheet: 309.7 TFLOP/s tensor with sparsity, so 154.8 dense; 38.7 fp32; 48 GB, 768 GB/s. The link is
    # PCIe 4.0 x16 as collectives use it, since NVLink connects only pairs of these.
    "a6000": Device(
        name="NVIDIA RTX A6000",
        flops={"bfloat16": 154.8e12, "float32": 38.7e12},
        achieved=0.6,
        basis="estimated for fused bf16 layers, not measured",
        memory=48 * 10**9,
        link=22e9,
        bandwidth=768e9,
        launched=True,
        triton=True,
        varlen=True,
    ),
    # NVIDIA's datasheet: bf16 1,979 TFLOP/s with sparsity, so 989 dense; 67 fp32; 141 GB, 4.8 TB/s; NVLink 450 GB/s per
    # direction. The fp8 peak is twice that of bf16.
    "h200": Device(
        name="NVIDIA H200",
        flops={"bfloat16": 989e12, "float32": 67e12},
        achieved=0.46,
        basis="published for training a 3B model on H100 in bf16 (mosaicml/llm-foundry, scripts/train/benchmarking), "
        "not measured here",
        memory=141 * 10**9,
        link=370e9,
        bandwidth=4.8e12,
        fp8=2.0,
        launched=True,
        triton=True,
        varlen=True,
    ),
    # Intel (R. Kaplan, slides on Gaudi 3, August 2024): 432 TFLOP/s bf16, 96 GB; 2.45 TB/s (Habana's datasheet). 21 of
    # its 24 ports of 100 Gb/s stay in the node.
    "gaudi2": Device(
        name="Intel Gaudi 2",
        flops={"bfloat16": 432e12},
        achieved=0.6,
        basis="published for training MPT-7B on 8 devices (Databricks, January 2024: 260 TFLOP/s), not measured here",
        memory=96 * 10**9,
        link=260e9,
        bandwidth=2.45e12,
    ),
}
# The same chip and the same links, with less memory (NVIDIA's datasheet of the SXM module).
_TABLE["h100"] = replace(_TABLE["h200"], name="NVIDIA H100", memory=80 * 10**9)


def device(kind: DeviceKind, ranks: int) -> Device:
    """The device of a kind. `cpu` is this machine, measured now, its rate and memory divided among the ranks."""
    if kind != "cpu":
        return _TABLE[kind]
    rate = _matmul_rate()
    return Device(
        name=f"CPU rank (1/{ranks} of this machine)",
        flops={"float32": rate / ranks},
        achieved=0.8,
        basis=f"of numpy's fp32 matrix products, measured now at {rate / 1e9:.0f} GFLOP/s on all cores",
        memory=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // ranks,
        link=2e9,  # through memory, by gloo
    )


def _matmul_rate() -> float:
    """FLOP/s of fp32 matrix products of a layer's size; the best of six, about 0.2 s in all."""
    rows, inner, columns = 1024, 1024, 1024
    left, right = np.ones((rows, inner), np.float32), np.ones((inner, columns), np.float32)
    best = 0.0
    for _ in range(6):
        start = time.perf_counter()
        left @ right
        best = max(best, 2 * rows * inner * columns / (time.perf_counter() - start))
    return best
