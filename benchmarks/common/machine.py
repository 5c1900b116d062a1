"""Helpers of all benchmarks: name and matmul rate of the machine, executed FLOPs, results as JSON."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

Shape = Sequence[int]
RESULTS = Path(__file__).parents[1] / "results"


def describe() -> str:
    """Processor, threads used and versions, in one line."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    threads = torch.get_num_threads()
    return (
        f"{name}, {os.cpu_count()} cores, {threads} thread(s), Python {platform.python_version()}, "
        f"torch {torch.__version__}"
    )


def write(path: Path, result: Mapping[str, Any]) -> None:
    """Write the result as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def peak_mib() -> float:
    """Peak resident memory of this process. Not from getrusage, whose peak a child inherits from its parent."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) / 1024


def matmul_rate(shapes: Sequence[tuple[int, int]], tokens: int) -> float:
    """FLOP/s of multiplying `tokens` rows with one fp32 weight matrix (out, in) of each shape, three times each."""
    inputs = {width: torch.randn(tokens, width) for _, width in shapes}
    weights = [torch.randn(shape) for shape in shapes]
    start = time.perf_counter()
    for weight in weights * 3:
        torch.nn.functional.linear(inputs[weight.shape[1]], weight)
    return 3 * sum(2 * tokens * rows * columns for rows, columns in shapes) / (time.perf_counter() - start)


def executed_flops(work: Callable[[], object]) -> int:
    """FLOPs of all matrix products that `work` runs, including the backward pass; attention counts as a full square.

    Counted by torch, which has a formula for every fused attention except the CPU's; that one is added here.
    """
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    mapping = {fused: _attention_flops, backward: _attention_backward_flops}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        work()
    return int(counter.get_total_flops())


def _attention_flops(query: Shape, key: Shape, *_: object, **__: object) -> int:
    """Two products of (queries, width) with (width, keys) for each head."""
    batch, heads, queries, width = query
    return 4 * batch * heads * queries * key[-2] * width


def _attention_backward_flops(_: Shape, query: Shape, key: Shape, *__: object, **___: object) -> int:
    """Four such products, and the scores recomputed."""
    return 5 * _attention_flops(query, key) // 2
