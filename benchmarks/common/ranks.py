"""Start the ranks of a real run in a second: processes of `launchers/train.py` that are forked from a server.

The server has imported torch and DeepSpeed once, because importing them is most of a short run.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from trainer.runs.launch_env import free_port

ROOT = Path(__file__).parents[2]

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    [
        "benchmarks.common.ranks",
        "deepspeed",
        "trainer.workflows.evaluate_run",
        "trainer.engine.loop",
        "trainer.workflows.setup",
        # Imported by torch's optimizers and by DeepSpeed when a run begins: three quarters of a short run.
        "torch._dynamo",
        "deepspeed.runtime.zero.muon.muon_optimizer",
        "deepspeed.ops",
        "trainer.workflows.train",
        "trainer.models.by_id.sasrec",
    ]
)


@dataclass
class Ranks:
    """The processes of a run."""

    processes: list[ForkServerProcess]
    folder: Path
    codes: list[int | None] = field(default_factory=list)

    def wait(self, timeout: float = 180) -> list[int | None]:
        """Wait for all ranks and return their exit codes; None: still running after `timeout` seconds, and killed."""
        end = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        self.codes = [process.exitcode for process in self.processes]
        self.kill()
        return self.codes

    def end_of(self, rank: int, timeout: float = 180) -> int | None:
        """Exit code of one rank; None if it is still running after `timeout` seconds."""
        self.processes[rank].join(timeout)
        return self.processes[rank].exitcode

    def kill(self) -> None:
        """Send SIGKILL to all ranks and wait until they have ended."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def said(self, rank: int) -> str:
        """Output (stdout and stderr) of a rank."""
        return (self.folder / f"{rank}.out").read_text()

    @property
    def all_said(self) -> str:
        """Output of all ranks, rank after rank."""
        return "".join(self.said(rank) for rank in range(len(self.processes)))


def environments(ranks: int) -> list[dict[str, str]]:
    """Environment variables that a launcher sets for each rank of one node."""
    port = str(free_port())
    common = {
        "DS_ACCELERATOR": "cpu", "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
    }  # fmt: skip
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def start_server(*folders: Path) -> None:
    """Start the fork server, if it is not running, with this process's import path behind `folders`.

    It inherits the environment, where nobody else must find that path.
    """
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, [ROOT, *folders, *filter(None, sys.path)]))
    forkserver.ensure_running()
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


def start_ranks(
    folder: Path, words: list[str], *, ranks: int = 2, prepare: Callable[[int], None] | None = None
) -> Ranks:
    """Start `launchers/train.py WORDS` on `ranks` ranks, whose outputs go to `folder`.

    Args:
        words: arguments of the command line.
        prepare: called in each process with its rank, before the command.
    """
    folder.mkdir(parents=True, exist_ok=True)
    start_server()  # read by the fork server when it starts
    processes = []
    for rank, environment in enumerate(environments(ranks)):
        arguments = (environment, words, folder / f"{rank}.out", prepare)
        process = _FORKS.Process(target=_run_rank, args=arguments, daemon=True)
        process.start()
        processes.append(process)
    return Ranks(processes, folder)


def _run_rank(
    environment: dict[str, str], words: list[str], output: Path, prepare: Callable[[int], None] | None
) -> None:
    """Run the command as one rank; the target of its process."""
    os.environ.update(environment)
    sys.argv = ["train.py", *words]
    # By descriptor, so that output of native libraries and of a crash is in the file too.
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    from launchers.command import exit_process, run_command
    from launchers.train import main

    if prepare:
        prepare(int(environment["RANK"]))
    exit_process(run_command(main))
