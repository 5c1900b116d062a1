"""Train and test several systems on one dataset: `python launchers/compare.py PRESET... [section.key=value ...]`.

Each system runs through `launchers/train.py`, teachers and first stages first, and all end in one table. What is done
is skipped: start the same command again to go on. A system that fails does not stop the others.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from launchers.command import leave, run_command
from trainer.config import ConfigError
from trainer.engine.preemption import STOPS
from trainer.runs.folder import RunFolder
from trainer.runs.launch_env import free_port
from trainer.runs.preflight import check_door
from trainer.workflows.comparison import Planned, finished, plan
from trainer.workflows.comparison_table import Outcome, record, table

_TRAIN = Path(__file__).with_name("train.py")


def main(arguments: Sequence[str]) -> None:
    """Run what is missing, print the table of what is there.

    Raises:
        ValueError: the command cannot be, or a system failed; the others were run.
    """
    options = _parse(arguments)
    runs = plan(
        [Path(word) for word in options.words if "=" not in word], [word for word in options.words if "=" in word]
    )
    if options.dry_run:
        print("\n".join(_forecast(runs, options.ranks)))
        return
    outcomes: list[Outcome] = []
    for number, run in enumerate(runs, 1):
        print(f"== {number}/{len(runs)} {run.name}: {run.config.output}", file=sys.stderr)
        outcomes.append(_run(run, outcomes, options.ranks))
    document = json.dumps([record(outcome, runs) for outcome in outcomes], indent=1) + "\n"
    print(document if options.json else table(outcomes, "text"), end="")
    for path in options.out:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(document if path.suffix == ".json" else table(outcomes, "markdown"))
    failed = [outcome for outcome in outcomes if outcome.error]
    for outcome in failed:
        print(f"{outcome.run.name} failed: {outcome.error}", file=sys.stderr)
    if failed:
        raise ValueError(f"{len(failed)} of {len(runs)} systems failed: mend them and start the same command again")


def _run(run: Planned, before: Sequence[Outcome], ranks: int) -> Outcome:
    if done := finished(run.config):
        return Outcome(run, done)
    if missing := [other.run.name for other in before if other.error and run.builds_on(other.run)]:
        return Outcome(run, error=f"not started, it builds on {missing[0]}")
    code, error = _train(run, ranks)
    if done := finished(run.config):
        return Outcome(run, done)
    if RunFolder(run.config.output).requeue.is_file():
        raise ValueError(f"{run.name} was stopped by a signal and is saved: start the same command again to go on")
    return Outcome(run, error=error or f"ended without results (exit code {code})")


def _train(run: Planned, ranks: int) -> tuple[int, str]:
    """Exit code of the training command, and its line of error; its log is passed on."""
    command = [sys.executable]
    if ranks > 1:
        # As the `deepspeed` command does.
        command += ["-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks), "--master_port", str(free_port())]
    error = ""
    with subprocess.Popen(
        [*command, str(_TRAIN), str(run.preset), *run.words],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace",
    ) as process:  # fmt: skip
        before = {number: signal.signal(number, lambda got, _: process.send_signal(got)) for number in STOPS}
        assert process.stderr is not None
        for line in process.stderr:
            sys.stderr.write(line)
            if line.startswith("error: ") or not error.startswith("error: "):
                error = line.strip() or error
    for number, handler in before.items():
        signal.signal(number, handler)
    return process.returncode, error.removeprefix("error: ") if process.returncode else ""


def _forecast(runs: Sequence[Planned], ranks: int) -> list[str]:
    """A line a run: done, where it goes on, or what is missing."""
    width = max(len(run.name) for run in runs)
    undone: list[Planned] = []
    lines = []
    for number, run in enumerate(runs, 1):
        state = _state(run, [other.name for other in undone if run.builds_on(other)], ranks)
        if state != "done":
            undone.append(run)
        lines.append(f"{number:>2}  {run.name.ljust(width)}  {run.config.output}: {state}")
    return lines


def _state(run: Planned, waits_for: Sequence[str], ranks: int) -> str:
    if finished(run.config):
        return "done"
    if waits_for:
        return f"trains after {' and '.join(waits_for)}"
    try:
        check_door(run.config, ranks)
        checkpoint = RunFolder(run.config.output).newest()
    except (ValueError, OSError) as error:
        return f"cannot run: {error}"
    return f"goes on from step {checkpoint.progress.step}" if checkpoint else "trains"


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="compare.py", description=__doc__.split("\n")[0])
    parser.add_argument(
        "words", nargs="+", metavar="PRESET|section.key=value",
        help="presets, and changes to those whose system has the key; NAME:section.key=value changes one alone; "
        "output=FOLDER puts each run into FOLDER/NAME",
    )  # fmt: skip
    parser.add_argument("--ranks", type=int, default=1, help="processes a run, started by DeepSpeed")
    parser.add_argument("--dry-run", action="store_true", help="list what would run, what is done, what is missing")
    parser.add_argument("--json", action="store_true", help="print the results as JSON instead of the table")
    parser.add_argument(
        "--out", type=Path, action="append", default=[], metavar="FILE", help="write them to FILE.md or FILE.json too"
    )
    options = parser.parse_intermixed_args(arguments)
    if all("=" in word for word in options.words):
        raise ConfigError("name at least one preset, for example trainer/presets/sasrec.yaml")
    if options.ranks < 1:
        raise ConfigError(f"--ranks {options.ranks}: give the number of processes")
    if wrong := [path for path in options.out if path.suffix not in (".md", ".json")]:
        raise ConfigError(f"--out {wrong[0]}: name a file that ends in .md or .json")
    return options


if __name__ == "__main__":
    leave(run_command(main))
