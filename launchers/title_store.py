"""Compute the keys and values of all titles before a run: `python launchers/title_store.py PRESET key=value ...`.

For systems without adapters. Give the words of the run, with `system.llm.title_store=FOLDER` among them; the run then
reads titles from there instead of running them. One process, on its accelerator where it has one.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from launchers.command import exit_process, run_command
from trainer.config import ConfigError, LLM4RecConfig, load_config
from trainer.runs.requirements import check_llm_path, check_prefix_cacheable


def main(arguments: Sequence[str], prog: str = "title_store.py") -> None:
    """Write the folder, or say that it is there."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__.split("\n")[0])
    parser.add_argument("preset", type=Path, help="YAML file, or the name of a preset, such as llm_srec")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the preset")
    parser.add_argument("--limit-gb", type=float, default=100.0, help="refuse to write a larger file (default 100)")
    options = parser.parse_intermixed_args(arguments)
    config = load_config(options.preset, options.overrides)
    system = config.system
    if not isinstance(system, LLM4RecConfig):
        raise ConfigError(f"{system.name} has no large language model, so no title store either")
    check_prefix_cacheable(config, system)
    check_llm_path(system.llm.path)
    if system.llm.title_store is None:
        raise ConfigError("where is the store to be written? Add system.llm.title_store=FOLDER")

    from trainer.distributed import stop
    from trainer.workflows.title_store import build_prefix_cache

    try:
        print(build_prefix_cache(config, system, Path(system.llm.title_store), options.limit_gb))
    finally:
        stop()


if __name__ == "__main__":
    exit_process(run_command(main))
