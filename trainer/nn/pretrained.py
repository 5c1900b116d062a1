"""Loading shared by language models and text encoders: folders, the hub, tokenizers, fingerprints."""

from __future__ import annotations

import hashlib
import json
import socket
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
import transformers
from huggingface_hub import constants
from packaging.version import Version
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging
from transformers.utils.peft_utils import find_adapter_config_file

from trainer.runs.model_folder import TOKENIZER_FILES, may_be_hub_id, settings_problem, with_cure

_EDGE_BYTES = 1 << 20
"""Bytes that a fingerprint reads at each end of a file."""
# transformers before 4.56 only knows the old name, and would ignore the new one.
_DTYPE_ARGUMENT = "dtype" if Version(transformers.__version__) >= Version("4.56") else "torch_dtype"
_FINGERPRINTED = {".json", ".safetensors", ".model", ".txt", ".bin", ".tiktoken", ".vocab", ".bpe"}
"""Suffixes of the files that transformers may read weights, settings or a vocabulary from."""


class LLMError(ValueError):
    """The language model or text encoder cannot be used; the message says why and names the cure."""


def read_settings(path: str, *, what: str, cure: str) -> PretrainedConfig:
    """Read the model configuration in a folder or at a hub id.

    Args:
        what: start of the error message, for example "system.llm.path=/models/x is not a language model".
        cure: end of the error message.

    Raises:
        LLMError: there is none, or it cannot be read.
    """
    if Path(path).is_dir() and (problem := settings_problem(Path(path))):
        raise LLMError(f"{what}: {with_cure(problem, cure)}")
    reachable = hub_reachable(path)
    try:
        settings: PretrainedConfig = AutoConfig.from_pretrained(
            path, trust_remote_code=False, local_files_only=not reachable
        )
        adapter = find_adapter_config_file(path, local_files_only=not reachable)
    except Exception as error:  # a file may hold anything, and transformers raises anything on it
        reason = _why(error)
        if not Path(path).is_dir():
            hub = f"answers: {reason}" if reachable else "cannot be reached (or HF_HUB_OFFLINE is set)"
            reason = "there is no such folder" + (f", and the Hugging Face hub {hub}" if may_be_hub_id(path) else "")
        raise LLMError(f"{what}: {reason}; {cure}") from error
    if adapter is not None:
        # transformers would read the model that the adapter names instead of this one.
        raise LLMError(f"{what}: adapter_config.json in it makes it an adapter of some other model; {cure}")
    for name in ("_attn_implementation", "_experts_implementation"):
        if "/" in str(getattr(settings, name, "")):
            raise LLMError(f"{what}: its config.json asks for code from the hub ({getattr(settings, name)}); {cure}")
    return settings


def _why(error: Exception) -> str:
    """The reason in an error of transformers, in one line."""
    if isinstance(error, KeyError) and error.args == ("segments",):
        return "its attention is code of its own, which does not take another attention function"
    if "custom code" in str(error):
        return "it needs Python code that comes with it (`auto_map`), and such code is never run"
    if isinstance(error, RecursionError):
        return "a JSON file in it is nested too deeply"
    return first_line(error)


def read_tokenizer(path: str, *, cure: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer in a folder or at a hub id.

    Raises:
        LLMError: there is none, or it does not load.
    """
    silence_transformers()
    folder = Path(path)
    # For some folders without a tokenizer transformers builds an empty one.
    if folder.is_dir() and not any(found for pattern in TOKENIZER_FILES for found in folder.glob(pattern)):
        raise LLMError(f"{folder} has no tokenizer (no tokenizer.json or tokenizer.model); {cure}")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            path, trust_remote_code=False, local_files_only=not hub_reachable(path)
        )
    except Exception as error:  # a file may hold anything, and tokenizers raises `Exception` itself
        raise LLMError(f"{path} has no tokenizer that loads ({_why(error)}); {cure}") from error
    return tokenizer


def read_model(
    path: str, settings: PretrainedConfig, *, dtype: str, cure: str, unread: str | None = None, **more: Any
) -> PreTrainedModel:
    """Load a model without any head, making sure that all its weights exist.

    Args:
        unread: prefix of the names of weights that may be missing.
        more: further arguments of `from_pretrained`.

    Raises:
        LLMError: weights are missing or damaged.
    """
    silence_transformers()
    try:
        model, report = AutoModel.from_pretrained(
            path,
            config=settings,
            **in_dtype(dtype),
            output_loading_info=True,
            trust_remote_code=False,
            local_files_only=not hub_reachable(path),
            **more,
        )
    except Exception as error:  # weights may hold anything, such as a pickle, which is refused
        raise LLMError(f"cannot load the weights of {path}: {_why(error)}; {cure}") from error
    # transformers initialises missing weights at random.
    missing = sorted(name for name in report["missing_keys"] if unread is None or not name.startswith(unread))
    if missing:
        raise LLMError(f"the weights of {path} lack {missing[0]} ({len(missing)} missing): copy them again")
    loaded: PreTrainedModel = model
    return loaded


def in_dtype(name: str) -> dict[str, torch.dtype]:
    """Keyword argument of `from_pretrained` and `from_config` that sets the dtype, given by its name in torch."""
    return {_DTYPE_ARGUMENT: getattr(torch, name)}


def fingerprint(path: str, *settings: object) -> str:
    """Twelve hex digits that change with the weights, the tokenizer or `settings`.

    Reads small files whole, and large ones at both ends only: hashing 16 GB would take a minute at each start. A hub id
    is hashed by its name.
    """
    folder = Path(path)
    digest = hashlib.sha256(json.dumps(settings).encode())
    if not folder.is_dir():
        digest.update(path.encode())
        return digest.hexdigest()[:12]
    names = [p for p in sorted(folder.iterdir()) if p.suffix in _FINGERPRINTED or p.name.startswith("vocab.")]
    for file_path in (path for path in names if path.is_file()):
        size = file_path.stat().st_size
        digest.update(f"{file_path.name}:{size}".encode())
        with file_path.open("rb") as file:
            digest.update(file.read(_EDGE_BYTES))
            file.seek(max(size - _EDGE_BYTES, 0))
            digest.update(file.read(_EDGE_BYTES))
    return digest.hexdigest()[:12]


@cache
def hub_reachable(path: str) -> bool:
    """Whether to ask the hub for `path`; False for a folder, offline, and where the hub does not answer.

    Its client would retry for a minute. The answer is cached for the process.
    """
    if not may_be_hub_id(path) or constants.HF_HUB_OFFLINE:
        return False
    if getproxies():
        return True  # behind a proxy a direct connection says nothing about the hub
    hub = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection(
            (hub.hostname or "", hub.port or (80 if hub.scheme == "http" else 443)), timeout=5
        ).close()
    except OSError:
        return False
    return True


def silence_transformers() -> None:
    """Silence transformers: progress bars, warnings about weights of unused layers and titles beyond the context."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def first_line(error: Exception) -> str:
    """The first line of an error message, without trailing punctuation."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".:")
