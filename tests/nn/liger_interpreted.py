"""Compare Liger's kernels in Triton's interpreter with the plain modules; `test_liger.py` runs this as a script.

Prints the largest differences in hidden states and in gradients of injected embeddings, for each model named.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton.language as tl
from helpers import build_llm
from transformers import AutoConfig
from triton.runtime import interpreter

from trainer.config import LLMConfig
from trainer.data.prompts.packing import pack
from trainer.data.prompts.prompt import READOUT_SLOT, Prompt
from trainer.nn.llm.backbone import load_llm
from trainer.nn.llm.liger import check_liger
from trainer.nn.pretrained import LLMError

_whole = interpreter._implicit_cvt


def _convert(argument: Any) -> Any:
    """Convert Python floats to fp32 as a compiled kernel does; the interpreter leaves them as they are."""
    if not isinstance(argument, float):
        return _whole(argument)
    return tl.tensor(interpreter.TensorHandle(np.array([argument], np.float32), tl.float32), tl.float32)


def _fill_gaps() -> None:
    """Define the CUDA functions that Liger's kernels call and the interpreter does not have."""
    interpreter._implicit_cvt = _convert
    rms_norm: Any = importlib.import_module("liger_kernel.ops.rms_norm")
    rms_norm.rsqrt = lambda x: 1.0 / tl.sqrt(x)
    geglu: Any = importlib.import_module("liger_kernel.ops.geglu")
    geglu.tanh = lambda x: 2.0 * tl.sigmoid(2.0 * x) - 1.0


def _prompts() -> list[Prompt]:
    rng = np.random.default_rng(1)
    prompts = []
    for length in (14, 11, 12):
        token_T = np.append(np.arange(2, 8), rng.integers(2, 400, length - 6))
        prompts.append(Prompt(token_T, np.array([8, length - 1]), np.array([1, READOUT_SLOT]), np.array([length - 1])))
    return prompts


def main(folder: Path, families: list[str]) -> None:
    _fill_gaps()
    packed = pack(_prompts())
    vector_SD = torch.randn(6, 32, generator=torch.Generator().manual_seed(2)).requires_grad_()
    weight_PD = torch.randn(3, 32, generator=torch.Generator().manual_seed(3))
    for family in families:
        path, found = str(build_llm(folder / family, family=family)), []
        for options in ({}, {"kernels": "liger"}, {"kernels": "liger", "recompute": True}):
            llm = load_llm(LLMConfig(path=path, dtype="float32", **options))
            hidden_PD = llm(packed, vector_SD)
            found.append((hidden_PD.detach(), *torch.autograd.grad((hidden_PD * weight_PD).sum(), vector_SD)))
        norm, expected = llm.decoder.norm, found[0]
        assert hasattr(norm, "casting_mode"), "Liger replaced no module"
        assert expected[1].abs().max() > 0.1
        apart = [float((a - b).abs().max()) for one in found[1:] for a, b in zip(one, expected, strict=True)]
        print(family, *apart, flush=True)
    try:
        check_liger(AutoConfig.for_model("gpt_neox"))
    except LLMError as error:
        print(error)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
