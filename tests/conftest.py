"""Fixtures that several folders share, and the tiers of the tests.

Tiers, by what a test starts: `process` (ranks, commands), `slurm` (a cluster), `training` (it trains a system until it
has learned something); everything else is the unit tier, which `make check` runs.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

os.environ.setdefault("DS_ACCELERATOR", "cpu")
# One thread per process: on a busy machine, tiny operations spend their time in thread synchronisation. Set before the
# libraries are imported, which read these once; polars and tokenizers have thread pools of their own.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "POLARS_MAX_THREADS"):
    os.environ.setdefault(variable, "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

_TIERS = {"slurm": "slurm", "distributed": "process", "faults": "process", "fake_cuda": "process"}
"""Folders whose tests all start something."""
_ORDER = ("slurm", "process", "training")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by folder, and start the longest tiers first, so that two workers finish at about the same time."""
    for item in items:
        tier = _TIERS.get(item.path.relative_to(Path(__file__).parent).parts[0])
        if tier:
            item.add_marker(getattr(pytest.mark, tier))
    items.sort(key=_rank)


def _rank(item: pytest.Item) -> int:
    marks = {mark.name for mark in item.iter_markers()}
    return next((rank for rank, tier in enumerate(_ORDER) if tier in marks), len(_ORDER))


Shared = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Shared:
    """Build a folder once for all workers of a test run."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def build(name: str, write: Callable[[Path], object]) -> Path:
        folder, done = root / f"shared-{name}", root / f"shared-{name}.done"
        with FileLock(root / f"shared-{name}.lock"):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)  # what a failed attempt left
                folder.mkdir()
                write(folder)
                done.touch()
        return folder

    return build


@pytest.fixture(scope="session")
def world(shared: Shared) -> Path:
    """A synthetic dataset of 61 users, not a multiple of any batch size or number of ranks used."""
    from helpers import build_world

    return shared("world", lambda folder: build_world(folder, users=61)) / "dataset"


@pytest.fixture(scope="session")
def tiny_llm(shared: Shared) -> Path:
    """A random Llama of three layers with a tokenizer."""
    from helpers import build_llm

    return shared("llm", build_llm)


@pytest.fixture(scope="session")
def tiny_encoder(shared: Shared) -> Path:
    """A random BERT of two layers with a tokenizer."""
    from helpers import build_encoder

    return shared("encoder", build_encoder)


@pytest.fixture(scope="session")
def teacher(shared: Shared, world: Path) -> Path:
    """A SASRec run on the synthetic dataset."""
    from helpers import sasrec_config, train_run

    return shared("teacher", lambda folder: train_run(sasrec_config(world, folder / "sasrec"))) / "sasrec"


@pytest.fixture(scope="session")
def stage1(shared: Shared, world: Path, teacher: Path, tiny_encoder: Path) -> Path:
    """A run of A-LLMRec's stage 1 on top of `teacher`."""
    from helpers import text_config, train_run

    section: dict[str, Any] = {"name": "a_llmrec_stage1", "teacher": str(teacher)}
    section |= {"encoder": {"path": str(tiny_encoder)}, "latent_dim": 12, "max_tokens": 32}
    return (
        shared("stage1", lambda folder: train_run(text_config(world, folder / "stage1", section, epochs=1))) / "stage1"
    )


@pytest.fixture
def with_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refusals as on a machine where bitsandbytes is installed."""
    monkeypatch.setattr("trainer.runs.model_folder._is_installed", lambda package: True)
