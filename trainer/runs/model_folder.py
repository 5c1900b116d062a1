"""Folders that are given as a language model or text encoder: what they hold instead of one, by names and small files.

Torch-free, so that a login node can name it within a second. Nothing in a folder is run.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from shards.manifest import parse_json
from trainer.config.load import ConfigError

LLM_CURE = "set system.llm.path to a folder with config.json, safetensors weights and a tokenizer"

ENCODER_CURE = "set system.encoder.path to a folder with config.json, safetensors weights and a tokenizer of an encoder"

TOKENIZER_FILES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken")
"""Files that hold a whole vocabulary, as patterns."""
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_ADAPTER = "adapter_config.json"
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_POINTER = b"version https://git-lfs.github.com/spec/"
_POINTER_BYTES = 1024
"""A Git LFS pointer is shorter."""
_MOST_BYTES = 64 << 20
"""Longest JSON file that is read: the index of a model of a thousand shards has some megabytes."""
_MERGE = "merge it into its model (peft's `merge_and_unload`) and save that"
_SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})\.(safetensors|bin)")


def check_llm_path(path: str, key: str = "system.llm.path") -> None:
    """Check that the path of a language model holds one, or may be a hub id, which only loading can check.

    Raises:
        ConfigError: no such folder, or one that cannot be loaded; the message says what it holds.
    """
    _check_path(path, key, "a language model", LLM_CURE)


def check_encoder_path(path: str) -> None:
    """Check that the path of a text encoder holds a model, or may be a hub id, which only loading can check.

    Raises:
        ConfigError: no such folder, or one that cannot be loaded; the message says what it holds.
    """
    _check_path(path, "system.encoder.path", "a text encoder", ENCODER_CURE)


def _check_path(path: str, key: str, kind: str, cure: str) -> None:
    problem = None
    if Path(path).is_dir():
        problem = folder_problem(Path(path))
    elif not may_be_hub_id(path):
        problem = "there is no such folder"
    if problem:
        raise ConfigError(f"{key}={path} is not {kind}: {with_cure(problem, cure)}")


def with_cure(problem: str, cure: str) -> str:
    """A problem and the cure of all such; a problem that has a cure of its own names it behind a colon."""
    return f"{problem}, or {cure}" if ": " in problem else f"{problem}; {cure}"


def may_be_hub_id(path: str) -> bool:
    """Whether the text looks like a hub id, `name` or `owner/name`, and does not exist as a path."""
    return path.count("/") < 2 and not path.startswith((".", "/", "~")) and not Path(path).exists()


def folder_problem(folder: Path) -> str | None:
    """Why the folder does not hold a model that can be loaded, in one line; None if nothing speaks against it."""
    files = _files(folder)
    return settings_problem(folder) or next(chain(_weights(folder, files), _tokenizer(folder, files)), None)


def settings_problem(folder: Path) -> str | None:
    """Why the model that config.json describes cannot be loaded; its weights and tokenizer may be missing."""
    files = _files(folder)
    found = chain(
        _of_hub_cache(folder),
        _pointers(folder, files),
        _of_other_kind(folder, files),
        _adapter(folder, files),
        _code(folder),
        _quantized(folder),
        _foreign_index(folder, files),
    )
    return next(found, None)


def quantization_of(folder: Path) -> str | None:
    """How the folder's weights are quantized, such as `gptq`; None if they are not, or if there is no such folder."""
    found = settings_of(folder).get("quantization_config")
    if not isinstance(found, dict):
        return None
    if any(found.get(key) is True for key in ("load_in_4bit", "load_in_8bit")):
        return "bitsandbytes"
    return str(found.get("quant_method", "an unknown method"))[:40]


def settings_of(folder: Path) -> dict[str, Any]:
    """The content of config.json; empty where it is not an object, which loading explains better."""
    return _json(folder / "config.json")


def _files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_file()}


def _of_hub_cache(folder: Path) -> Iterator[str]:
    models = [folder] if (folder / "snapshots").is_dir() else sorted(folder.glob("models--*"))
    if (folder / "config.json").exists() or not models:
        return
    snapshots = sorted(path for path in models[0].glob("snapshots/*") if path.is_dir())
    where = f"the model is in {snapshots[-1]}" if snapshots else "and the model was never downloaded"
    yield f"it is a cache of the Hugging Face hub, {where}"


def _pointers(folder: Path, files: set[str]) -> Iterator[str]:
    for name in sorted(files):
        path = folder / name
        if path.stat().st_size < _POINTER_BYTES:
            with path.open("rb") as file:
                if file.read(len(_POINTER)) == _POINTER:
                    yield f"{name} is a Git LFS pointer, not the file itself: run `git lfs pull` in the folder"


def _of_other_kind(folder: Path, files: set[str]) -> Iterator[str]:
    has_gguf = any(name.endswith(".gguf") for name in files)
    if has_gguf and not _any(folder, _WEIGHTS):
        yield (
            "its weights are in a GGUF file, which is not read: convert it once, "
            "`llm-srec convert-gguf FILE.gguf FOLDER`"
        )
    if "config.json" in files:
        return
    if _ADAPTER in files:
        yield f"it is an adapter alone{_base(folder)}: {_MERGE}"
    if any(name.startswith("consolidated") for name in files) or "params.json" in files:
        yield "it is in the layout of its maker (params.json, consolidated weights): take the Hugging Face layout"
    for inside in sorted(folder.iterdir()):
        if (inside / "config.json").is_file():
            yield f"it has no config.json, but {inside} has one"
    yield "it has no config.json"


def _adapter(folder: Path, files: set[str]) -> Iterator[str]:
    if _ADAPTER not in files:
        return
    if _any(folder, _WEIGHTS, but=_ADAPTER_WEIGHTS):
        yield (
            f"an adapter{_base(folder)} is beside its weights ({_ADAPTER}), and would be applied to them: if it is "
            f"merged into them already, remove {_ADAPTER} and the adapter's weights"
        )
    else:
        yield f"it is an adapter{_base(folder)} ({_ADAPTER}): {_MERGE}"


def _base(folder: Path) -> str:
    base = _json(folder / _ADAPTER).get("base_model_name_or_path")
    return f" of {base[:200]!r}" if isinstance(base, str) else ""


def _code(folder: Path) -> Iterator[str]:
    """Architectures that only come with their own code. Others have such code too, and are loaded without it."""
    settings = settings_of(folder)
    if "auto_map" in settings and not _knows_type(str(settings.get("model_type"))):
        yield "it needs Python code that comes with it (`auto_map`), and such code is never run"


def _knows_type(model_type: str) -> bool:
    """Whether transformers has this architecture, as far as the names of its folders tell."""
    transformers = importlib.util.find_spec("transformers")  # does not import it
    if transformers is None or transformers.origin is None:
        return True
    name = model_type.replace("-", "_").removesuffix("_text")
    return bool(re.fullmatch(r"\w+", name)) and (Path(transformers.origin).parent / "models" / name).is_dir()


def _quantized(folder: Path) -> Iterator[str]:
    method = quantization_of(folder)
    if method is None:
        return
    if method != "bitsandbytes":
        yield (
            f"its weights are quantized ({method}), and of quantized weights only those of bitsandbytes are read: take "
            "the same model in bf16 or fp32"
        )
    if not _is_installed("bitsandbytes"):
        yield "its weights are quantized with bitsandbytes, which is not installed: `pip install bitsandbytes`"


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _foreign_index(folder: Path, files: set[str]) -> Iterator[str]:
    """An index of weights that leads out of the folder."""
    for index in _indices(files):
        names = _json(folder / index).get("weight_map")
        if not isinstance(names, dict):
            yield f"{index} is damaged: copy it again"
        elif outside := sorted(repr(name)[:200] for name in names.values() if Path(str(name)).name != name):
            yield f"{index} names {outside[0]}, which is not a file in the folder"


def _weights(folder: Path, files: set[str]) -> Iterator[str]:
    """Weights that are missing, some or all."""
    for index in _indices(files):
        names = set(_json(folder / index)["weight_map"].values())
        if missing := sorted(names - files):
            yield f"{missing[0]} is missing ({len(missing)} of {len(names)} files in {index}): copy it again"
    if broken := sorted(path.name for path in folder.iterdir() if path.is_symlink() and not path.exists()):
        yield f"{broken[0]} is a link to a file that does not exist: copy it again"
    shards = [match for name in sorted(files) if (match := _SHARD.fullmatch(name))]
    if shards and not _indices(files) and not files & {"model.safetensors", "pytorch_model.bin"}:
        index = f"{shards[0][1]}.{shards[0][3]}.index.json"
        yield f"{index} is missing, without which its {len(shards)} files of weights are not read: copy it again"
    if not _any(folder, _WEIGHTS):
        other = [name for name in sorted(files) if name.endswith((".h5", ".msgpack", ".pth", ".pt", ".onnx"))]
        yield "it has no weights" + (f" that are read (not {other[0]})" if other else "")


def _indices(files: set[str]) -> list[str]:
    return sorted(name for name in files if name.endswith((".safetensors.index.json", ".bin.index.json")))


def _tokenizer(folder: Path, files: set[str]) -> Iterator[str]:
    if "tokenizer.json" in files or _any(folder, ("*.model", "*.tiktoken", "vocab.txt")):
        return
    if "tekken.json" in files:
        yield "its only tokenizer is tekken.json, which is not read: copy the tokenizer.json of its Hugging Face layout"
    if "vocab.json" in files and "merges.txt" not in files:
        yield "its tokenizer has vocab.json, but merges.txt is missing: copy it again"
    if not _any(folder, TOKENIZER_FILES):
        yield "it has no tokenizer (no tokenizer.json or tokenizer.model)"


def _any(folder: Path, patterns: tuple[str, ...], but: tuple[str, ...] = ()) -> bool:
    return any(path.name not in but for pattern in patterns for path in folder.glob(pattern))


def _json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is none."""
    try:
        if file.stat().st_size > _MOST_BYTES:
            return {}
        found = parse_json(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
