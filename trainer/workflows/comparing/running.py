"""Run the systems of a comparison one after another, each by the training command in its own processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from trainer.engine.preemption import STOPS
from trainer.runs.folder import RunFolder
from trainer.runs.launch_env import free_port
from trainer.runs.parents import PARENT
from trainer.runs.preflight import preflight
from trainer.workflows.comparing.comparison import ComparedRun, finished
from trainer.workflows.comparing.table import Outcome

_LAUNCHERS = Path(__file__).parents[3] / "launchers"


def run_comparison(runs: Sequence[ComparedRun], ranks: int) -> Iterator[Outcome]:
    """Run and yield each outcome, in order; finished runs are not repeated, and a failure does not stop the next runs.

    Args:
        ranks: processes per run.

    Raises:
        ValueError: a run was stopped by a signal; the comparison resumes when it is started again.
    """
    outcomes: list[Outcome] = []
    for run in runs:
        outcomes.append(_run(run, outcomes, ranks))
        yield outcomes[-1]


def _run(run: ComparedRun, before: Sequence[Outcome], ranks: int) -> Outcome:
    if done := finished(run.config):
        return Outcome(run, done)
    if missing := [other.run.name for other in before if other.error and run.builds_on(other.run)]:
        return Outcome(run, error=f"not started because it builds on {missing[0]}, which failed")
    code, error = run_launcher("train.py", [str(run.preset), *run.overrides], ranks)
    if done := finished(run.config):
        return Outcome(run, done)
    if RunFolder(run.config.output).requeue.is_file():
        raise ValueError(f"{run.name} was stopped by a signal and is saved: start the same command again to resume")
    return Outcome(run, error=error or f"ended without results (exit code {code})")


def run_launcher(name: str, arguments: Sequence[str], ranks: int) -> tuple[int, str]:
    """Run a launcher on ranks, passing its log through; returns its exit code and its error line ("" on success).

    Raises:
        KeyboardInterrupt: after Ctrl-C, once the launcher has saved and ended.
        ValueError: after a different stop signal, likewise.
    """
    command = [sys.executable]
    if ranks > 1:
        # What the `deepspeed` command runs, in this interpreter.
        command += ["-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks), "--master_port", str(free_port())]
    error = ""
    received: list[int] = []

    def forward(number: int, _: object) -> None:
        received.append(number)
        process.send_signal(number)

    with subprocess.Popen(
        [*command, str(_LAUNCHERS / name), *arguments],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace",
        env={**os.environ, PARENT: str(os.getpid())},
    ) as process:  # fmt: skip
        # Stop signals are forwarded to the run, which saves and exits; `_run` then finds its requeue file.
        before = {number: signal.signal(number, forward) for number in (*STOPS, signal.SIGINT)}
        assert process.stderr is not None
        for line in process.stderr:
            sys.stderr.write(line)
            # The last error line, or failing that the last line (of a traceback, for example).
            if line.startswith("error: ") or not error.startswith("error: "):
                error = line.strip() or error
    for number, handler in before.items():
        signal.signal(number, handler)
    if signal.SIGINT in received:
        raise KeyboardInterrupt
    if received:  # also if it came too late to stop this launcher: the next one is not to start
        name = signal.Signals(received[0]).name
        raise ValueError(f"stopped by {name}; what ran is saved: start the same command again to resume")
    return process.returncode, error.removeprefix("error: ") if process.returncode else ""


def forecast(runs: Sequence[ComparedRun], ranks: int) -> list[str]:
    """One line per run: done, the step that it resumes from, or what is missing."""
    width = max(len(run.name) for run in runs)
    undone: list[ComparedRun] = []
    lines = []
    for number, run in enumerate(runs, 1):
        state = _state(run, [other.name for other in undone if run.builds_on(other)], ranks)
        if state != "done":
            undone.append(run)
        lines.append(f"{number:>2}  {run.name.ljust(width)}  {run.config.output}: {state}")
    return lines


def _state(run: ComparedRun, waits_for: Sequence[str], ranks: int) -> str:
    if finished(run.config):
        return "done"
    if waits_for:
        return f"trains after {' and '.join(waits_for)}"
    try:
        preflight(run.config, ranks)
        checkpoint = RunFolder(run.config.output).newest()
    except (ValueError, OSError) as error:
        return f"cannot run: {error}"
    return f"resumes from step {checkpoint.progress.step}" if checkpoint else "trains"
