"""Train any system: `deepspeed launchers/train.py PRESET.yaml section.key=value ...`.

Also runs as plain `python launchers/train.py ...` in one process, and under any launcher that sets RANK, WORLD_SIZE
and LOCAL_RANK. Started again with the same output, it resumes where it stopped. SIGUSR1 and SIGTERM make it save and
leave with exit code 0 and the file RUN/requeue.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from launchers.command import exit_process, run_command
from trainer.config import load_config
from trainer.engine.preemption import StopSignals
from trainer.runs.folder import RunFolder
from trainer.runs.launch_env import ranks_started
from trainer.runs.preflight import preflight


def main(arguments: Sequence[str], prog: str = "train.py") -> None:
    """Train, then test the best checkpoint and print the table."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__.split("\n")[0])
    parser.add_argument("preset", type=Path, help="YAML file, or the name of a preset, such as sasrec")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the preset")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    options = parser.parse_args(arguments)
    # Checked before torch is imported: a mistyped key costs a tenth of a second, not half a minute.
    config = load_config(options.preset, options.overrides)
    if os.environ.get("RANK", "0") == "0" and config.output.is_dir():
        RunFolder(config.output).requeue.unlink(missing_ok=True)
    checked = preflight(config, ranks_started())
    signals = StopSignals()
    signals.install()

    from trainer.distributed import stop
    from trainer.workflows.train import train

    train(checked, signals)
    stop()
    signals.ignore()


if __name__ == "__main__":
    exit_process(run_command(main))
