"""Compute the prefix cache (KV cache of all titles) of a run: `python launchers/title_store.py PRESET key=value ...`.

For systems without adapters. Give the settings of the run, including `system.llm.title_store=FOLDER`; the run then
reads titles from FOLDER instead of running them. Runs in one process, on its accelerator if there is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from launchers.command import CommandParser, exit_process, run_command, show_progress
from trainer.config import ConfigError, LLM4RecConfig, load_config
from trainer.runs.model_folder import check_llm_path
from trainer.runs.requirements import check_prefix_cacheable


def main(arguments: Sequence[str], prog: str = "title_store.py") -> None:
    """Write the folder, or print that it exists.

    Raises:
        ValueError: the system cannot use a prefix cache, no folder is given, or it would be larger than the limit.
    """
    parser = CommandParser(prog=prog, description=__doc__.split("\n")[0])
    parser.add_argument("preset", type=Path, help="YAML file, or the name of a preset, such as llm_srec")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the preset")
    parser.add_argument("--limit-gb", type=float, default=100.0, help="refuse to write more than this (default 100)")
    options = parser.parse_intermixed_args(arguments)
    show_progress()
    config = load_config(options.preset, options.overrides)
    system = config.system
    if not isinstance(system, LLM4RecConfig):
        raise ConfigError(f"{system.name} has no LLM and so no prefix cache: give the preset of an LLM recommender")
    check_prefix_cacheable(config, system)
    check_llm_path(system.llm.path)
    if system.llm.title_store is None:
        raise ConfigError("no folder to write the prefix cache to: add system.llm.title_store=FOLDER")

    from trainer.distributed import stop
    from trainer.workflows.title_store import build_prefix_cache

    try:
        print(build_prefix_cache(config, system, Path(system.llm.title_store), options.limit_gb))
    finally:
        stop()


if __name__ == "__main__":
    exit_process(run_command(main))
