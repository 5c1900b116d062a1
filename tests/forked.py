"""Run scripts in processes forked from a server that has imported torch, DeepSpeed and transformers once.

The imports take ten seconds of CPU, more than most runs in the tests; a fork skips them. Each process is otherwise
what `python SCRIPT ...` starts: its own environment, working folder, output and exit code. Tests of the start itself
(what is imported when, launchers, Slurm) use real interpreters: `helpers.run_cold`.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from benchmarks.common.ranks import start_server

ROOT = Path(__file__).parents[1]

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    [
        "forked",
        "deepspeed",
        "benchmarks.common.ranks",
        "trainer.models.by_text.build",
        "trainer.models.llm.build",
        "trainer.nn.llm.lora",
        "trainer.workflows.recommending.recommend",
        "trainer.workflows.comparing.running",
        "trainer.workflows.train",
    ]
)


@dataclass
class Forked:
    """A started process."""

    process: ForkServerProcess
    words: list[str]
    folder: Path
    """Where its outputs go."""

    def finish(self, timeout: float) -> subprocess.CompletedProcess[str]:
        """Wait until the process exits.

        Raises:
            subprocess.TimeoutExpired: The process did not exit in time and was killed.
        """
        self.process.join(timeout)
        code = self.process.exitcode
        if code is None:
            self.process.kill()
            self.process.join()
        outputs = [(self.folder / name).read_text(errors="replace") for name in ("out", "err")]
        shutil.rmtree(self.folder)
        if code is None:
            raise subprocess.TimeoutExpired(self.words, timeout, *outputs)
        return subprocess.CompletedProcess(self.words, code, *outputs)


def run_forked(
    script: Path, arguments: Sequence[str | Path], environment: Mapping[str, str], timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run a script until it exits, from a working folder outside the repository."""
    return start_forked(script, arguments, environment).finish(timeout)


def start_forked(script: Path, arguments: Sequence[str | Path], environment: Mapping[str, str]) -> Forked:
    """Start a script; `environment` is added to this process's environment."""
    folder = Path(tempfile.mkdtemp(prefix="forked-"))
    words = [str(script), *map(str, arguments)]
    start_server(ROOT / "tests")
    process = _SERVER.Process(target=_run, args=(words, {**os.environ, **environment}, folder), daemon=True)
    process.start()
    return Forked(process, words, folder)


def _run(words: list[str], environment: dict[str, str], folder: Path) -> None:
    """Entry point of the forked process."""
    os.environ.clear()
    os.environ.update(environment)
    time.tzset()
    os.chdir("/")
    for descriptor, name in ((1, "out"), (2, "err")):
        file = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
    sys.argv = words
    sys.path.insert(0, str(Path(words[0]).parent))  # as `python SCRIPT` does
    runpy.run_path(words[0], run_name="__main__")
