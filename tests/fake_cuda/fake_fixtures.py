"""Fixtures: a process with fake CUDA devices, and what it needs on disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fake_device
import pytest
import torch
from helpers import ROOT

from benchmarks.common.gpu_checks import TEXTS
from benchmarks.common.random_llm import write_tokenizer
from benchmarks.common.setting import LLMS, synthetic_dataset

TINY = {
    "model_type": "llama", "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 256, "vocab_size": 1024,
}  # fmt: skip
_USERS = 160
"""Users of the dataset: 20 for each of 8 ranks."""
_WORKER = Path(__file__).with_name("fake_worker.py")


@dataclass
class FakeCuda:
    """Asks the process to run something; what it has run once it is not asked again."""

    process: subprocess.Popen[str]
    folder: Path
    _answers: dict[str, dict[str, Any]] = field(default_factory=dict)

    def run(
        self,
        system: str,
        llm: str,
        *overrides: str,
        layers: int,
        rank: int = 0,
        ranks: int = 8,
        users: int = _USERS,
        steps: int = 1,
    ) -> dict[str, Any]:
        """See `fake_step.run`; `users` is the global batch, `layers` those of the LLM that are run."""
        common = (
            "output=unused", f"data.path={self.folder / 'data'}", "data.verify=false", f"train.batch_size={users}",
            f"system.llm.path={self.folder / llm}", f"system.llm.layers={layers}",
        )  # fmt: skip
        return self.ask(
            {"preset": system, "overrides": [*common, *overrides], "rank": rank, "ranks": ranks, "steps": steps}
        )

    def ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a line of `fake_worker.py`."""
        line = json.dumps(question)
        if line not in self._answers:
            assert self.process.stdin is not None
            assert self.process.stdout is not None
            print(line, file=self.process.stdin, flush=True)
            self._answers[line] = json.loads(self.process.stdout.readline())
        answer = self._answers[line]
        assert "error" not in answer, answer["error"]
        return answer


@pytest.fixture(scope="session")
def fake_cuda(shared: Callable[[str, Callable[[Path], object]], Path]) -> Iterator[FakeCuda]:
    """Skipped where the device cannot be compiled, and on a torch that has a real one."""
    if torch.version.cuda or torch.version.hip:
        pytest.skip(f"torch {torch.__version__} has CUDA of its own; the fake device stands in for it in a CPU build")
    if reason := fake_device.missing():
        pytest.skip(reason)
    folder = shared("fake_cuda", _write)
    paths = [str(ROOT), str(ROOT / "tests"), str(_WORKER.parent), os.environ.get("PYTHONPATH", "")]
    with subprocess.Popen(
        [sys.executable, str(_WORKER), str(folder / fake_device.LIBRARY)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    ) as process:
        yield FakeCuda(process, folder)
        process.kill()  # nothing is lost, and an end in order takes it seconds


def _write(folder: Path) -> None:
    """The library, a dataset, and folders of LLMs without weights."""
    fake_device.compile_library(folder)
    words = "--min-item 1 --min-train 3 --shards 1"
    # Titles as long as those of Amazon Scientific: about 390 tokens per user, 54 per item (`benchmarks.first_gpu`).
    synthetic_dataset(folder, users=_USERS, items=400, words=words, more_words=40)
    for name, settings in {**LLMS, "tiny": TINY}.items():
        write_tokenizer(folder / name, TEXTS, vocabulary=1000)
        (folder / name / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], **settings}))
