"""Build the prefix cache: the keys and values of all titles of a catalog, computed once for the runs that use it."""

from __future__ import annotations

import shutil
from pathlib import Path

from trainer.config import ConfigError, LLM4RecConfig, RunConfig
from trainer.data.prompts.prefix_cache_index import PrefixCacheIndex
from trainer.data.reading.dataset import open_dataset
from trainer.distributed import start
from trainer.evaluation.progress import Progress
from trainer.models.llm.build import prompt_writer
from trainer.nn.llm.backbone import load_llm
from trainer.nn.llm.prefix_cache import open_prefix_cache, prefix_cache_bytes, write_prefix_cache


def build_prefix_cache(config: RunConfig, system: LLM4RecConfig, folder: Path, limit_gb: float) -> str:
    """Write the prefix cache, or verify an existing one; returns a summary for people.

    Args:
        limit_gb: maximum size, in units of 1e9 bytes.

    Raises:
        ValueError: it would exceed the limit or the free space, or an existing one is damaged or belongs to a
            different LLM or dataset.
    """
    dataset = open_dataset(config.data.path, full_check=config.data.verify)
    rows = PrefixCacheIndex.of_items(prompt_writer(system, dataset), dataset.num_items)
    summary = f"{len(rows):,} tokens of {dataset.num_items:,} titles"
    if folder.exists():
        open_prefix_cache(folder, system.llm, rows, verify=True)
        return f"{folder} exists and is intact: {summary}"
    size = prefix_cache_bytes(system.llm, rows)
    _check_room(folder, size, limit_gb)
    device = start(config.engine.threads).device
    llm = load_llm(system.llm).to(device)
    with Progress("tokens of titles", len(rows)) as progress:
        write_prefix_cache(folder, llm, system.llm, rows, device, progress.add)
    return f"{folder}: {summary}, {size / 1e9:.2f} GB"


def _check_room(folder: Path, size: int, limit_gb: float) -> None:
    nearest = next(path for path in folder.absolute().parents if path.exists())
    free = shutil.disk_usage(nearest).free
    if size > limit_gb * 1e9:
        raise ConfigError(
            f"the prefix cache would take {size / 1e9:.2f} GB, more than --limit-gb {limit_gb:g}: raise it, or leave "
            "system.llm.title_store out"
        )
    if size > free:
        raise ConfigError(
            f"the prefix cache takes {size / 1e9:.2f} GB, but {nearest} has {free / 1e9:.2f} GB left: free some space, "
            "or set system.llm.title_store to a folder on a larger disk"
        )
