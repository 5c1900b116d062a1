"""Compute the KV cache of all titles of a catalog once, for the runs that use it."""

from __future__ import annotations

import shutil
from pathlib import Path

from trainer.config import ConfigError, LLM4RecConfig, RunConfig
from trainer.data.prompts.prefix_cache_index import PrefixCacheIndex
from trainer.data.reading.dataset import open_dataset
from trainer.distributed import start
from trainer.models.llm.build import prompt_writer
from trainer.nn.llm.backbone import load_llm
from trainer.nn.llm.prefix_cache import open_prefix_cache, prefix_cache_bytes, write_prefix_cache


def build_prefix_cache(config: RunConfig, system: LLM4RecConfig, folder: Path, limit_gb: float) -> str:
    """Write the folder, or check the one that is there; returns what it holds, for people.

    Raises:
        ValueError: it would be larger than the limit or the free space, or what is there is of another run.
    """
    dataset = open_dataset(config.data.path, full_check=config.data.verify)
    rows = PrefixCacheIndex.of_items(prompt_writer(system, dataset), dataset.num_items)
    what = f"{len(rows):,} tokens of {dataset.num_items:,} titles"
    if folder.exists():
        open_prefix_cache(folder, system.llm, rows, verify=True)
        return f"{folder} is there and intact: {what}"
    size = prefix_cache_bytes(system.llm, rows)
    _check_room(folder, size, limit_gb)
    device = start(config.engine.threads).device
    write_prefix_cache(folder, load_llm(system.llm).to(device), system.llm, rows, device)
    return f"{folder}: {what}, {size / 1e9:.2f} GB"


def _check_room(folder: Path, size: int, limit_gb: float) -> None:
    nearest = next(path for path in folder.absolute().parents if path.exists())
    free = shutil.disk_usage(nearest).free
    if size > limit_gb * 1e9:
        raise ConfigError(
            f"the store would take {size / 1e9:.2f} GB, more than --limit-gb {limit_gb:g}: raise it, or leave "
            "system.llm.title_store out"
        )
    if size > free:
        raise ConfigError(
            f"the store takes {size / 1e9:.2f} GB, but {nearest} has {free / 1e9:.2f} GB left: make room, or set "
            "system.llm.title_store to a larger disk"
        )
