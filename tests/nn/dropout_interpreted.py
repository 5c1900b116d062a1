"""The Triton kernel of the hashed dropout without a GPU; `test_dropout.py` runs this as a script, once for each mode.

`interpret` runs the kernel in Triton's interpreter and prints, for each case, how many of its elements differ in any
bit from torch's. `compile` compiles it for three generations of GPUs and prints, for each, how many roundings are not
IEEE 754's: divisions by approximation, and products fused with sums.
"""

from __future__ import annotations

import re
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget

from trainer.nn import dropout_kernel
from trainer.nn.dropout import hashed_dropout

CASES = ((1, 1, 0.5), (7, 1030, 0.05), (130, 72, 0.1), (33, 2048, 0.9), (0, 8, 0.1))


def interpret() -> None:
    generator = torch.Generator().manual_seed(1)
    for tokens, width, p in CASES:
        x_TD = torch.randn(tokens, width, generator=generator)
        x_TD.flatten()[-3:] = torch.tensor([torch.inf, torch.nan, -0.0])[: x_TD.numel()]
        word_T = torch.randint(-(2**31), 2**31, (tokens,), dtype=torch.int32, generator=generator)
        salt = 195 * 0x10001  # that of the last adapter of 28 layers with seven each
        expected_TD = hashed_dropout(x_TD, word_T, salt, p)
        found_TD = dropout_kernel.dropped(x_TD, word_T, salt, int(p * 2**32) - 2**31, 1.0 - p)
        print(tokens, width, int((found_TD.view(torch.int32) != expected_TD.view(torch.int32)).sum()))


def compile_for_gpus() -> None:
    types = {"x": "*fp32", "word": "*i32", "out": "*fp32", "kept_share": "fp32"}
    types |= dict.fromkeys(("tokens", "width", "salt", "threshold"), "i32")
    types |= dict.fromkeys(("ROWS", "COLUMNS"), "constexpr")
    blocks = {"ROWS": dropout_kernel._ROWS, "COLUMNS": dropout_kernel._COLUMNS}
    source = triton.compiler.ASTSource(dropout_kernel._kernel, types, blocks)
    for capability in (80, 86, 90):
        ptx = triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]
        assert "div.rn.f32" in ptx
        print(capability, len(re.findall(r"div\.full|div\.approx|\bfma", ptx)))


if __name__ == "__main__":
    {"interpret": interpret, "compile": compile_for_gpus}[sys.argv[1]]()
