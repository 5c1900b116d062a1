"""What a run needs on disk besides its dataset, checked without torch."""

from __future__ import annotations

from pathlib import Path

from shards.manifest import Manifest
from trainer.config.load import ConfigError
from trainer.config.runs import Checkpoint, CheckpointError, RunFolder
from trainer.config.schema import SASRecConfig

LLM_CURE = "set system.llm.path to a folder with config.json, safetensors weights and a tokenizer"


def teacher_run(path: Path, data: Path, manifest: Manifest) -> tuple[SASRecConfig, Checkpoint]:
    """The teacher's configuration and best checkpoint.

    Raises:
        ValueError: no run there, another system, damaged, or trained on another catalog than `data`.
    """
    train_one = f"train one with `launchers/train.py trainer/presets/sasrec.yaml data.path={data} output={path}`"
    run = RunFolder(path)
    if not (path / "config.yaml").is_file():
        raise CheckpointError(f"system.teacher={path} holds no run: {train_one}, or fix the path")
    config = run.config()
    if not isinstance(config.system, SASRecConfig):
        raise CheckpointError(f"system.teacher={path} holds a {config.system.name}, not a sasrec run: fix the path")
    try:
        checkpoint = run.best()
    except CheckpointError as error:
        raise CheckpointError(f"the teacher cannot be used: {error}; or train another one") from None
    if checkpoint.identity.catalog_sha256 != manifest.catalog_sha256:
        raise CheckpointError(
            f"the teacher {path} was trained on another catalog than {data}: "
            "train a teacher on this dataset, or set data.path to the teacher's"
        )
    return config.system, checkpoint


def check_llm_path(path: str) -> None:
    """Refuse a path that no language model can be at; a hub id is found out later.

    Raises:
        ConfigError: no such folder.
    """
    if not Path(path).is_dir() and not may_be_hub_id(path):
        raise ConfigError(f"system.llm.path={path} is no language model: there is no such folder; {LLM_CURE}")


def may_be_hub_id(path: str) -> bool:
    """Whether the text reads as `name` or `owner/name` and is nothing on this machine."""
    return path.count("/") < 2 and not path.startswith((".", "/", "~")) and not Path(path).exists()
