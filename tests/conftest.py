"""Fixtures that several folders share; each is built once a session."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("DS_ACCELERATOR", "cpu")
# Tiny operations crawl when threads wait for each other on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic dataset of 61 users, which is no multiple of any batch size or number of ranks used."""
    from helpers import build_world

    return build_world(tmp_path_factory.mktemp("world"), users=61)


@pytest.fixture(scope="session")
def tiny_llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of three layers with a tokenizer."""
    from helpers import build_llm

    return build_llm(tmp_path_factory.mktemp("llm"))


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of two layers with a tokenizer."""
    from helpers import build_encoder

    return build_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory, world: Path) -> Path:
    """A SASRec run on the synthetic dataset, trained by the real command."""
    from helpers import run_command, sasrec_config, write_config

    folder = tmp_path_factory.mktemp("teacher")
    preset = write_config(folder / "sasrec.yaml", sasrec_config(world, folder / "sasrec"))
    done = run_command("launchers/train.py", preset)
    assert done.returncode == 0, done.stderr
    return folder / "sasrec"


@pytest.fixture(scope="session")
def stage1(tmp_path_factory: pytest.TempPathFactory, world: Path, teacher: Path, tiny_encoder: Path) -> Path:
    """A run of A-LLMRec's first stage over that teacher."""
    from helpers import run_command, text_config, write_config

    folder = tmp_path_factory.mktemp("stage1")
    section = {"name": "a_llmrec_stage1", "teacher": str(teacher), "encoder": {"path": str(tiny_encoder)}}
    section |= {"latent_dim": 12, "max_tokens": 32}
    preset = write_config(folder / "stage1.yaml", text_config(world, folder / "stage1", section, epochs=1))
    done = run_command("launchers/train.py", preset)
    assert done.returncode == 0, done.stderr
    return folder / "stage1"
