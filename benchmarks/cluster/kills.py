"""Kill a training run at random moments and check that only the steps since the last checkpoint are lost.

    python -m benchmarks.cluster.kills [--kills 50] [--minutes 60] [--seed 0]

The run is a SASRec on two ranks, with dropout (so that the random state matters), on a synthetic dataset. First it runs
undisturbed and keeps every checkpoint. Then the same run is started repeatedly, and all its ranks get SIGKILL: half of
the time at a random moment between the start of the processes and about 30 steps later, half of the time soon after
the temporary folder of a checkpoint has appeared. After each kill every checkpoint that the run left must be intact and
equal that of the undisturbed run bit for bit, and the newest must be at most `train.save_every` steps back. A run that
finishes must have ended as the undisturbed run did; later kills hit a new run.

`tests/faults/` kills at chosen points of a save; this benchmark shows that no other point was forgotten.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common.machine import RESULTS, describe, write
from benchmarks.common.ranks import Ranks, start_ranks
from benchmarks.common.setting import synthetic_dataset
from trainer.reports.results import RESULTS_FILE, read
from trainer.runs.folder import FILES, MOMENTS, WEIGHTS, RunFolder, read_checkpoint

RANKS, SAVE_EVERY, STEPS = 2, 5, 240
_MAX_STEPS_ALIVE = 30
"""A start is killed at most about this many steps after its first."""


@dataclass(frozen=True)
class Kill:
    """One kill, and the state of the run at that moment."""

    started_from: int
    """Step of the checkpoint that this start resumed from."""
    done: int
    """Last step that is in `metrics.jsonl`."""
    kept: int
    """Step of the newest checkpoint after the kill."""
    in_save: bool
    """Whether a checkpoint was being written."""

    @property
    def lost(self) -> int:
        """Steps done that no checkpoint holds."""
        return max(self.done - self.kept, 0)


class Undisturbed:
    """The reference: a run that is not killed and keeps all its checkpoints."""

    def __init__(self, folder: Path, dataset: Path) -> None:
        self.run = RunFolder(folder / "undisturbed")
        arguments = _arguments(self.run.path, dataset, keep=STEPS)
        start_ranks(folder / "ranks", ["--help"], ranks=1).wait()  # the first start alone imports everything
        start = time.monotonic()
        ranks = start_ranks(folder / "ranks", arguments, ranks=RANKS)
        while not _steps_done(self.run, 0):
            _check_alive(ranks)
            time.sleep(0.01)
        self.seconds_to_start = time.monotonic() - start
        _check_end(ranks)
        self.seconds_of_steps = time.monotonic() - start - self.seconds_to_start
        self.digests = {step: _digests(self.run, step) for step in self.run.steps()}

    def check(self, run: RunFolder) -> int:
        """Compare all checkpoints of a killed run with those of this run; returns the newest step, 0 without one.

        Raises:
            CheckpointError: a checkpoint is damaged.
            RuntimeError: a checkpoint differs from that of this run.
        """
        for step in run.steps():
            read_checkpoint(run.step_path(step))
            if _digests(run, step) != self.digests[step]:
                raise RuntimeError(f"checkpoint {run.step_path(step)} differs from that of the undisturbed run")
        if (run.checkpoints / "best.json").exists():
            run.best()
        newest = run.newest()
        return newest.progress.step if newest else 0

    def check_end(self, run: RunFolder) -> None:
        """Check that a finished run has the same parameters, moments, best step and results as this run.

        Raises:
            RuntimeError: it differs.
        """
        ends = [
            (found.steps()[-1], found.best().progress.step, [r.metrics for r in read(found.path / RESULTS_FILE)])
            for found in (run, self.run)
        ]
        if self.check(run) != STEPS or ends[0] != ends[1]:
            raise RuntimeError(f"{run.path} ended differently from the undisturbed run: {ends}")


def main() -> None:
    """Kill, check, print, write."""
    options = _parse()
    os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker"  # killed processes do leave semaphores behind
    folder = Path(tempfile.mkdtemp(prefix="kills-"))
    start = time.monotonic()
    dataset = synthetic_dataset(folder, users=120, items=60, words="--min-train 3 --negatives 19 --shards 4")
    undisturbed = Undisturbed(folder, dataset)
    options.until = start + 60 * options.minutes
    kills, ends = _kill_all(options, folder, dataset, undisturbed)
    result = {
        "machine": describe(), "seed": options.seed, "ranks": RANKS, "steps_of_a_run": STEPS, "save_every": SAVE_EVERY,
        "asked": options.kills,
        "kills": len(kills),
        "in_a_save": sum(kill.in_save for kill in kills),
        "before_a_step": sum(kill.done == kill.started_from for kill in kills),
        "survived": len(kills),  # a kill that is not survived raises, and no result is written
        "most_steps_lost": max(kill.lost for kill in kills),
        "steps_lost": dict(sorted(Counter(kill.lost for kill in kills).items())),
        "steps_run": sum(kill.done - kill.started_from for kill in kills),
        "runs_ended": ends,
        "ends_bit_for_bit_equal": ends,
        "seconds": round(time.monotonic() - start),
    }  # fmt: skip
    write(options.out, result)
    shutil.rmtree(folder)  # after a failure it stays for inspection
    _print(result)


def _kill_all(
    options: argparse.Namespace, folder: Path, dataset: Path, undisturbed: Undisturbed
) -> tuple[list[Kill], int]:
    """All kills, and the number of runs that finished; the last run is finished without further kills."""
    rng = random.Random(options.seed)
    kills: list[Kill] = []
    run, ends = RunFolder(folder / "run0"), 0
    while True:
        arguments = _arguments(run.path, dataset, keep=2)
        done = len(kills) == options.kills or time.monotonic() > options.until
        kill = None if done else _start_and_kill(folder / "ranks", arguments, run, undisturbed, rng)
        if kill:
            if kill.lost > SAVE_EVERY:
                raise RuntimeError(f"{kill.lost} steps of {run.path} were lost")
            kills.append(kill)
            print(f"kill {len(kills):2}: from step {kill.started_from} to {kill.done}, {kill.kept} kept"
                  f"{', in a save' if kill.in_save else ''}", flush=True)  # fmt: skip
            continue
        if done:
            _check_end(start_ranks(folder / "ranks", arguments, ranks=RANKS))
        undisturbed.check_end(run)
        ends += 1
        if done:
            return kills, ends
        run = RunFolder(folder / f"run{ends}")


def _start_and_kill(
    folder: Path, arguments: list[str], run: RunFolder, undisturbed: Undisturbed, rng: random.Random
) -> Kill | None:
    """Start the run and kill it; None if it finished before its moment."""
    newest = run.newest()
    started_from = newest.progress.step if newest else 0
    leftover, lines = _being_written(run), _lines(run)
    step_seconds = undisturbed.seconds_of_steps / STEPS
    ranks = start_ranks(folder, arguments, ranks=RANKS)
    if rng.random() < 0.5:
        moment = time.monotonic() + rng.uniform(0, undisturbed.seconds_to_start + _MAX_STEPS_ALIVE * step_seconds)
        waits: Iterator[bool] = iter(lambda: time.monotonic() < moment, False)
    else:
        waits = _until_save(run, leftover, rng.randint(1, _MAX_STEPS_ALIVE // SAVE_EVERY), rng.uniform(0, 0.005))
    for _ in waits:
        if not _alive(ranks):
            _check_end(ranks)
            return None
        time.sleep(0.0005)
    ranks.kill()
    in_save = bool(_being_written(run).items() - leftover.items())
    done = _steps_done(run, lines) or started_from
    return Kill(started_from, done, undisturbed.check(run), in_save)


def _until_save(run: RunFolder, leftover: dict[str, int], count: int, seconds: float) -> Iterator[bool]:
    """Yield until `seconds` after the `count`-th save of this start has begun."""
    seen: set[str] = set()
    while len(seen) < count:
        yield True
        seen |= {name for name, _ in _being_written(run).items() - leftover.items()}
    moment = time.monotonic() + seconds
    while time.monotonic() < moment:
        yield True


def _being_written(run: RunFolder) -> dict[str, int]:
    """Temporary checkpoint folders and when they last changed: the leftovers of an earlier kill no longer change."""
    found = {}
    for path in run.checkpoints.glob(".writing-*"):
        try:
            found[path.name] = path.stat().st_mtime_ns
        except FileNotFoundError:
            continue  # renamed to its final name in the meantime
    return found


def _lines(run: RunFolder) -> int:
    file = run.path / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.is_file() else 0


def _steps_done(run: RunFolder, skip: int) -> int:
    """The last training step in `metrics.jsonl` behind its first `skip` lines; 0 without one."""
    file = run.path / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.is_file() else []  # the last line may be cut off
    steps = [line["step"] for line in map(json.loads, lines[skip:]) if "train/loss" in line]
    return int(steps[-1]) if steps else 0


def _digests(run: RunFolder, step: int) -> dict[str, Any]:
    files = json.loads((run.step_path(step) / FILES).read_text())
    return {name: files[name] for name in (WEIGHTS, MOMENTS)}


def _alive(ranks: Ranks) -> bool:
    return all(process.exitcode is None for process in ranks.processes)


def _check_alive(ranks: Ranks) -> None:
    if not _alive(ranks):
        raise RuntimeError(ranks.all_said)


def _check_end(ranks: Ranks) -> None:
    if ranks.wait(timeout=600) != [0] * RANKS:
        raise RuntimeError(ranks.all_said)


def _arguments(output: Path, dataset: Path, *, keep: int) -> list[str]:
    preset = Path(__file__).parents[2] / "trainer" / "presets" / "sasrec.yaml"
    settings = {
        "output": output, "data.path": dataset, "data.shuffle_shards": 2,
        "system.dim": 32, "system.max_length": 12, "system.dropout": 0.3,
        "train.batch_size": 12, "train.epochs": STEPS, "train.max_steps": STEPS, "train.validate_every": 1.6,
        "train.patience": STEPS, "train.save_every": SAVE_EVERY, "train.keep_checkpoints": keep, "train.log_every": 1,
        "engine.threads": 1,
    }  # fmt: skip
    return [str(preset), *(f"{key}={value}" for key, value in settings.items())]


def _print(result: dict[str, Any]) -> None:
    names = (
        "kills",
        "in_a_save",
        "before_a_step",
        "survived",
        "most_steps_lost",
        "runs_ended",
        "ends_bit_for_bit_equal",
    )
    print(" | ".join(names))
    print(" | ".join(str(result[name]) for name in names))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.cluster.kills", description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="kills in all")
    parser.add_argument("--minutes", type=float, default=60, help="no kill starts after this time")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--out", type=Path, default=RESULTS / "kills.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
