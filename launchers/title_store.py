"""Compute the keys and values of all titles before a run: `python launchers/title_store.py PRESET key=value ...`.

For systems without adapters. Give the words of the run, with `system.llm.title_store=FOLDER` among them; the run then
reads titles from there instead of running them. One process, on its accelerator where it has one.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from launchers.command import leave, run_command
from trainer.config import ConfigError, LLM4RecConfig, load_config
from trainer.runs.requirements import check_llm_path, check_storable


def main(arguments: Sequence[str]) -> None:
    """Write the folder, or say that it is there."""
    parser = argparse.ArgumentParser(prog="title_store.py", description=__doc__.split("\n")[0])
    parser.add_argument("preset", type=Path, help="YAML file, for example trainer/presets/llm_srec.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the preset")
    parser.add_argument("--limit-gb", type=float, default=100.0, help="refuse to write a larger file (default 100)")
    options = parser.parse_intermixed_args(arguments)
    config = load_config(options.preset, options.overrides)
    system = config.system
    if not isinstance(system, LLM4RecConfig):
        raise ConfigError(f"{system.name} has no large language model, so no title store either")
    check_storable(config, system)
    check_llm_path(system.llm.path)
    if system.llm.title_store is None:
        raise ConfigError("where is the store to be written? Add system.llm.title_store=FOLDER")
    folder = Path(system.llm.title_store)

    from trainer.data.prompts.prefix_cache_index import TitleRows
    from trainer.data.reading.dataset import open_dataset
    from trainer.distributed import start, stop
    from trainer.models.llm.build import prompt_writer
    from trainer.nn.llm.backbone import load_llm
    from trainer.nn.llm.prefix_cache import open_store, store_bytes, write_store

    dataset = open_dataset(config.data.path, full_check=config.data.verify)
    rows = TitleRows.of_items(prompt_writer(system, dataset), dataset.num_items)
    what = f"{len(rows):,} tokens of {dataset.num_items:,} titles"
    if folder.exists():
        open_store(folder, system.llm, rows, verify=True)
        print(f"{folder} is there and intact: {what}")
        return
    _check_room(folder, store_bytes(system.llm, rows), options.limit_gb)
    world = start(config.engine.threads)
    try:
        write_store(folder, load_llm(system.llm).to(world.device), system.llm, rows, world.device)
    finally:
        stop()
    print(f"{folder}: {what}, {store_bytes(system.llm, rows) / 1e9:.2f} GB")


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


if __name__ == "__main__":
    leave(run_command(main))
