"""An exported run on disk: its files, and how its configuration is found in it; torch-free.

    OUT/README.md                   model card
    OUT/export.json                 `ExportFacts`, with the sha256 of the files that loading reads
    OUT/config.yaml                 the configuration of the run
    OUT/weights.safetensors         everything that was trained; with state.json and files.json as in a checkpoint
    OUT/items.parquet               raw id, title and vector of every item
    OUT/item_vectors.npy            (N, D) vectors alone, in the same order
    OUT/dataset/                    manifest (with the statistics) and catalog, without any user
    OUT/teacher/ ...                weights and configuration of each run that the system builds on, by its key
    OUT/tokenizer/                  tokenizer of the language model or text encoder, whose weights are not exported
    OUT/metrics.json                test results with 95 % intervals
    OUT/index.faiss                 optional: item vectors as an index for faiss
    OUT/user_encoder.onnx           optional: histories to user vectors, for systems that know items by id

An exported run is its own best checkpoint, without Adam's moments: `RunFolder.best` reads it, so that an export can be
the teacher of a new run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Literal

from pydantic import TypeAdapter, ValidationError

from shards.manifest import file_sha256, parse_json
from trainer.config.load import ConfigError, load_config
from trainer.config.schema import RunConfig, built_on
from trainer.config.section import Section
from trainer.runs.folder import CheckpointError

FACTS, CONFIG, ITEMS, ITEM_VECTORS = "export.json", "config.yaml", "items.parquet", "item_vectors.npy"
DATASET, TOKENIZER, METRICS, CARD = "dataset", "tokenizer", "metrics.json", "README.md"
INDEX, ENCODER = "index.faiss", "user_encoder.onnx"
FORMAT: Final = 1
"""Version of the layout; increment it when an older loader could no longer read an export."""
_AGAIN = "copy the export again, or export the run again"

ModelKey = Literal["llm", "encoder"]
"""Key in the system section of the model that a system starts from."""


@dataclass(frozen=True)
class BaseModel:
    """The language model or text encoder of a system. Its weights are not part of an export."""

    key: ModelKey
    path: str
    """Folder or hub id that the run was trained with."""
    fingerprint: str
    """What `llm_fingerprint` or `encoder_fingerprint` found there."""


@dataclass(frozen=True)
class ExportFacts:
    """What loading an export needs besides its configuration and weights."""

    format: int
    base_model: BaseModel | None
    latest_time: int
    """Milliseconds since 1970 UTC that events of a history without times are dated."""
    files: Mapping[str, str]
    """sha256 of further files that loading reads, by their path in the export."""


_FACTS: Final = TypeAdapter(ExportFacts)


def is_export(path: Path) -> bool:
    """Whether the folder is an exported run."""
    return (path / FACTS).is_file()


def facts_json(facts: ExportFacts) -> str:
    """Content of `export.json`."""
    return json.dumps(asdict(facts), indent=1)


def read_facts(path: Path) -> ExportFacts:
    """Read `export.json`, and verify the sha256 of the files that it lists.

    Raises:
        CheckpointError: written by a newer version, or a file is missing or damaged.
    """
    file = path / FACTS
    try:
        found = parse_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is damaged ({error}): {_AGAIN}") from None
    if isinstance(found, dict) and isinstance(found.get("format"), int) and found["format"] > FORMAT:
        raise CheckpointError(
            f"{path} is an export of format {found['format']}, this version reads {FORMAT}: update it"
        )
    try:
        facts = _FACTS.validate_json(json.dumps(found), strict=True)
    except ValidationError as error:
        raise CheckpointError(f"{file} is damaged ({error.errors()[0]['msg']}): {_AGAIN}") from None
    for name, digest in facts.files.items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise CheckpointError(f"{file} names {name!r}, which is not a file in the folder: {_AGAIN}")
        if not (path / name).is_file():
            raise CheckpointError(f"{path / name} is missing: {_AGAIN}")
        if file_sha256(path / name) != digest:
            raise CheckpointError(f"{path / name} is damaged (its sha256 differs from {FACTS}): {_AGAIN}")
    return facts


def inside(config: RunConfig, folder: Path, data: Path | None = None) -> RunConfig:
    """The configuration with the paths of an export: the dataset and all source runs in its folder.

    Args:
        data: dataset folder; None: that of the export.
    """
    tree = config.model_dump(mode="json")
    tree["output"], tree["data"]["path"] = str(folder), str(data or folder / DATASET)
    # Neither names anything in the export: what training started from, and a cache that only saves time.
    tree["train"]["init_from"] = None
    for key in built_on(config.system):
        tree["system"][key] = str(folder / key)
    for section in tree["system"].values():
        if isinstance(section, dict) and "title_store" in section:
            section["title_store"] = None
    return RunConfig.model_validate(tree)


def read_config(path: Path) -> RunConfig:
    """The configuration of an export, with the current paths of its parts.

    Raises:
        ConfigError: it is damaged.
    """
    return inside(load_config(path / CONFIG), path)


def with_base_model(config: RunConfig, path: str) -> RunConfig:
    """The configuration with the language model or text encoder at another path.

    Raises:
        ConfigError: the system has neither.
    """
    key = base_model_key(config.system)
    if key is None:
        raise ConfigError(f"{config.system.name} has no language model: leave --llm out")
    tree = config.model_dump(mode="json")
    tree["system"][key]["path"] = path
    return RunConfig.model_validate(tree)


def base_model_key(system: Section) -> ModelKey | None:
    """The key of a system's language model or text encoder; None if it has neither."""
    keys: tuple[ModelKey, ...] = ("llm", "encoder")
    return next((key for key in keys if hasattr(system, key)), None)
