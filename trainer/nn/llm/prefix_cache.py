"""The prefix cache: a file with the keys and values of what precedes the first slot of each item prompt.

They depend on nothing that is trained, so one file serves every run on the same catalog and LLM. It is memory-mapped,
and a step reads only the rows of its own items. A row holds one token's keys and values of all layers, so that the rows
of a title are contiguous.

Letters: M rows, T tokens of a pass, L layers, 2 key and value, h KV heads, d head width.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shards.manifest import file_sha256, parse_json
from trainer.config import LLMConfig
from trainer.data.collators.base import to_device
from trainer.data.prompts.prefix_cache_index import PrefixCacheIndex
from trainer.nn.llm.backbone import FrozenLLM, kv_cache_shape, llm_fingerprint
from trainer.runs.atomic import atomic_folder

KEYS, FACTS = "keys.bin", "store.json"
_TOKENS_AT_ONCE = 4096
"""Most tokens per forward pass."""


class PrefixCacheError(ValueError):
    """The prefix cache cannot be used or written; the message says why and names the cure."""


def prefix_cache_bytes(config: LLMConfig, rows: PrefixCacheIndex) -> int:
    """Size of the file in bytes."""
    return math.prod(_shape(config, rows)) * _dtype(config).itemsize


def write_prefix_cache(
    folder: Path,
    llm: FrozenLLM,
    config: LLMConfig,
    rows: PrefixCacheIndex,
    device: torch.device,
    done: Callable[[int], None] = lambda rows: None,
) -> None:
    """Compute every row once, on the LLM's device, and write the file.

    Args:
        done: called after each pass with the number of rows that it computed.

    Raises:
        OSError: the disk is full; nothing is left behind.
    """
    with atomic_folder(folder) as beside:
        with (beside / KEYS).open("wb") as file:
            # Reserve the space first: on a full disk, writing to the memory map would kill the process.
            os.posix_fallocate(file.fileno(), 0, prefix_cache_bytes(config, rows))
        table_ML2hd = _mapped(beside, config, rows, shared=True)
        for part in rows.parts(_TOKENS_AT_ONCE):
            stream = to_device(part.stream, device)
            keys_TL2hd = llm.keys(stream, table_ML2hd[torch.from_numpy(part.before_M)].to(device))
            table_ML2hd[part.first : part.first + len(keys_TL2hd)] = keys_TL2hd.cpu()
            done(len(keys_TL2hd))
        (beside / FACTS).write_text(
            json.dumps(_identity(config, rows) | {"sha256": file_sha256(beside / KEYS)}, indent=1)
        )


def open_prefix_cache(folder: Path, config: LLMConfig, rows: PrefixCacheIndex, *, verify: bool) -> Tensor:
    """The rows (M, L, 2, h, d), memory-mapped.

    Args:
        verify: compare the file's sha256, which reads all of it.

    Raises:
        PrefixCacheError: it does not exist, is damaged, or was computed for a different LLM or catalog.
    """
    cure = f"remove {folder} and compute it with `launchers/title_store.py`, or leave system.llm.title_store out"
    try:
        facts: dict[str, Any] = parse_json((folder / FACTS).read_text())
        expected, size = facts["sha256"], (folder / KEYS).stat().st_size
    except (OSError, ValueError, TypeError, KeyError):
        raise PrefixCacheError(f"{folder} is not a prefix cache, or is damaged: {cure}") from None
    for part, value in _identity(config, rows).items():
        if facts.get(part) != value:
            raise PrefixCacheError(f"the prefix cache {folder} was computed for {_MISMATCH[part]}: {cure}")
    if size != prefix_cache_bytes(config, rows) or (verify and file_sha256(folder / KEYS) != expected):
        raise PrefixCacheError(f"{folder / KEYS} is damaged (it does not match {FACTS}): {cure}")
    return _mapped(folder, config, rows, shared=False)


_MISMATCH = {
    "llm": "a different language model, or different layers or dtype of it",
    "titles": "different titles or prompt templates",
}


def _identity(config: LLMConfig, rows: PrefixCacheIndex) -> dict[str, str]:
    return {"llm": llm_fingerprint(config), "titles": rows.sha256}


def _mapped(folder: Path, config: LLMConfig, rows: PrefixCacheIndex, *, shared: bool) -> Tensor:
    shape = _shape(config, rows)
    return torch.from_file(str(folder / KEYS), shared=shared, size=math.prod(shape), dtype=_dtype(config)).view(shape)


def _shape(config: LLMConfig, rows: PrefixCacheIndex) -> tuple[int, ...]:
    layers, heads, width = kv_cache_shape(config)
    return (len(rows), layers, 2, heads, width)


def _dtype(config: LLMConfig) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, config.dtype)
    return dtype
