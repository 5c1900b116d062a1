"""What can be exported, and how: checked before torch is imported."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trainer.config import ConfigError
from trainer.config.id_systems import BERT4RecConfig, GRU4RecConfig, NextItNetConfig, SASRecConfig
from trainer.runs.preflight import SavedRun
from trainer.runs.requirements import check_recommends

IndexKind = Literal["exact", "hnsw"]
"""`exact` compares a user with every item; `hnsw` (Malkov & Yashunin, 2018) with few, and may miss some."""
BY_ID = (SASRecConfig, GRU4RecConfig, BERT4RecConfig, NextItNetConfig)
"""Systems whose user encoder reads nothing but item ids."""


@dataclass(frozen=True)
class ExportOptions:
    """Parts of an export that not every export has."""

    index: IndexKind | None = None
    """Write the item vectors as an index for faiss."""
    onnx: bool = False
    """Write the user encoder of a system that knows items by id as ONNX."""
    license: str | None = None
    """Licence of the model card, by its identifier on the hub such as `apache-2.0`; None: the card names none."""


def check_export(saved: SavedRun, out: Path, options: ExportOptions) -> None:
    """Check that a run can be exported to a folder.

    Raises:
        ConfigError: it cannot; the message names the cure.
    """
    if saved.export is not None:
        raise ConfigError(f"{saved.config.output} is an export already: copy the folder")
    check_recommends(saved.config)
    check_new_folder(out)
    if options.index is not None:
        _check_installed("faiss", "faiss", "--index")
    if options.onnx:
        if not isinstance(saved.config.system, BY_ID):
            raise ConfigError(
                f"--onnx writes user encoders that read item ids alone, and {saved.config.system.name} reads "
                "texts: leave it out"
            )
        _check_installed("onnxscript", "onnx", "--onnx")


def check_new_folder(out: Path) -> None:
    """Check that a folder can be made: it does not exist, or is empty.

    Raises:
        ConfigError: it holds something, or is a file.
    """
    if out.is_dir() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty: name a new folder, or remove it first")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file: name a new folder")


def _check_installed(module: str, extra: str, option: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ConfigError(f"{option} needs {module}: pip install 'llm-srec-trainer[{extra}]'")
