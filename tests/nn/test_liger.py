"""Liger's fused kernels: refused where they cannot run, equal to the plain modules in Triton's interpreter.

The comparison needs two wheels that nothing else here needs: `pip install --no-deps liger-kernel triton`.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.config import LLMConfig
from trainer.nn.llm import liger
from trainer.nn.llm.backbone import check_llm
from trainer.nn.pretrained import LLMError

pytestmark = pytest.mark.process

FAMILIES = ["llama", "qwen3", "gemma", "olmo2"]


def test_without_cuda_or_liger(tiny_llm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = LLMConfig(path=str(tiny_llm), kernels="liger")
    with pytest.raises(
        LLMError, match=r"runs on CUDA only, and this is cpu: use CUDA, or set system\.llm\.kernels=none"
    ):
        check_llm(config)
    monkeypatch.setattr(liger, "accelerator", lambda: "cuda")
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(LLMError, match=r"cannot import liger-kernel .*: `pip install 'liger-kernel>=0\.8\.5'`, or"):
        check_llm(config)


@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("liger_kernel", "triton")),
    reason="liger-kernel and triton are not installed",
)
def test_fused_kernels_equal_the_plain_modules_in_values_and_gradients(tmp_path: Path) -> None:
    command = [sys.executable, str(Path(__file__).with_name("liger_interpreted.py")), str(tmp_path), *FAMILIES]
    paths = os.pathsep.join([*sys.path, str(Path(__file__).parents[1])])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    *lines, refusal = done.stdout.strip().splitlines()
    assert [line.split()[0] for line in lines] == FAMILIES
    for line in lines:
        hidden, gradient, hidden_again, gradient_again = map(float, line.split()[1:])
        assert max(hidden, hidden_again) < 1e-5, line
        assert max(gradient, gradient_again) < 3e-5, line
    assert refusal == "liger-kernel has no kernels for a 'gpt_neox': set system.llm.kernels=none"
