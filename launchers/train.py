"""Train a system: `deepspeed launchers/train.py PRESET.yaml section.key=value ...`.

Also runs as `python launchers/train.py ...` in one process, and under any launcher that sets RANK, WORLD_SIZE and
LOCAL_RANK. Run again with the same output, it resumes where it stopped. On SIGUSR1 or SIGTERM it saves, writes the file
RUN/requeue and exits with code 0; on Ctrl-C it saves and exits with 130.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from launchers.command import CommandParser, exit_process, run_command
from trainer.config import RunConfig, load_config
from trainer.engine.preemption import StopSignals
from trainer.runs.folder import RunFolder
from trainer.runs.launch_env import launched_world_size
from trainer.runs.lock import check_not_locked
from trainer.runs.preflight import preflight


def main(arguments: Sequence[str], prog: str = "train.py") -> None:
    """Train, test the best checkpoint, and print the table of results."""
    parser = CommandParser(prog=prog, description=__doc__.split("\n")[0])
    parser.add_argument("preset", type=Path, help="YAML file, or the name of a preset, such as sasrec")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the preset")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    options = parser.parse_args(arguments)
    # Before torch is imported: a mistyped key fails in a tenth of a second instead of half a minute.
    config = load_config(options.preset, options.overrides)
    check_not_locked(RunFolder(config.output))
    if os.environ.get("RANK", "0") == "0" and config.output.is_dir():
        RunFolder(config.output).requeue.unlink(missing_ok=True)
    checked = preflight(config, launched_world_size())
    signals = StopSignals()
    signals.install()

    from trainer.distributed import stop
    from trainer.workflows.train import train

    try:
        train(checked, signals)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_how_to_resume(config)) from None
    stop()
    signals.ignore()


def _how_to_resume(config: RunConfig) -> str:
    """What starting an interrupted run again will do."""
    steps = RunFolder(config.output).steps()
    if not steps:
        return "no checkpoint was written yet, so the same command starts from the beginning"
    again = "the same command with resume=auto" if config.resume == "never" else "the same command"
    return f"{again} resumes from the checkpoint of step {steps[-1]}"


if __name__ == "__main__":
    exit_process(run_command(main))
