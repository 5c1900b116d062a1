"""Time norms and feed-forward parts of a frozen layer: transformers', ours (`trainer/nn/llm/fused.py`), torch.compile.

    python -m benchmarks.elementwise [--tokens 6000] [--device cpu]

Forward and backward to the input, at the LLM's shape with random weights, in turns. A compiled part is compiled for any
number of tokens, as streams need; the seconds of that first call are reported separately.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from benchmarks.common.machine import RESULTS, describe, write
from trainer.nn.llm.fused import fuse


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="benchmarks.elementwise", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--llm", type=Path, default=Path("cache/smollm2-135m"), help="LLM folder; only its shape is used"
    )
    parser.add_argument("--tokens", type=int, default=6000, help="rows of the input")
    parser.add_argument("--rounds", type=int, default=9, help="timed calls of each kind, after one that warms up")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, default=RESULTS / "elementwise.json")
    options = parser.parse_args()
    settings = AutoConfig.from_pretrained(options.llm, trust_remote_code=False, local_files_only=True)
    settings.num_hidden_layers = 1
    decoder = AutoModel.from_config(settings, trust_remote_code=False, dtype=getattr(torch, options.dtype))
    decoder = decoder.to(options.device)
    layer: Any = decoder.requires_grad_(False).layers[0]
    x = torch.randn(1, options.tokens, settings.hidden_size, dtype=decoder.dtype, device=options.device)
    parts = {
        name: _measure(part, x, options.rounds)
        for name, part in (("norm", layer.input_layernorm), ("feed-forward", layer.mlp))
    }
    result = {"machine": describe(), "device": options.device, "llm": options.llm.name, "dtype": options.dtype,
              "tokens": options.tokens, "parts": parts}  # fmt: skip
    write(options.out, result)
    print(f"{result['machine']}\n{options.tokens} tokens at the shape of {options.llm.name}, {options.dtype}\n")
    for name, ways in parts.items():
        for way, row in ways.items():
            print(f"{name:14}{way:14}" + "".join(f"{key.replace('_', ' '):>22} {value}" for key, value in row.items()))


def _measure(part: nn.Module, x: Tensor, rounds: int) -> dict[str, dict[str, float]]:
    """Median milliseconds, speed-up over transformers and seconds of the first call, by way to run `part`."""
    ours = deepcopy(part)
    fuse(ours)
    compiled = torch.compile(deepcopy(part), dynamic=True)
    ways: dict[str, Callable[[Tensor], Tensor]] = {"transformers": part, "ours": ours, "compiled": compiled}
    first = {name: _seconds(way, x) for name, way in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            seconds[name].append(_seconds(way, x))
    found = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        name: {
            "milliseconds": round(1e3 * found[name], 2),
            "times_as_fast": round(found["transformers"] / found[name], 2),
            "first_call_seconds": round(first[name], 2),
        }
        for name in ways
    }


def _seconds(way: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """Seconds of one forward and backward pass."""
    x = x.clone().requires_grad_()
    start = time.perf_counter()
    value = way(x)
    (gradient,) = torch.autograd.grad(value, x, torch.ones_like(value))
    gradient.flatten()[0].item()  # waits until the device is done
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
