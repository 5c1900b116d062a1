"""Kills a training run over and over and checks that nothing is lost but the steps since the last checkpoint.

    python -m benchmarks.cluster.kills [--kills 50] [--minutes 60] [--seed 0]

A SASRec run on two ranks, with dropout, on a synthetic dataset built for the occasion. First it runs undisturbed and
keeps every checkpoint. Then the same run is started again and again, and all its ranks get SIGKILL: half of the time at
a random moment between the start of the processes and some 30 steps on, half of the time soon after the temporary
folder of a checkpoint has appeared. After each kill every checkpoint that the run left must be intact and equal that of
the undisturbed run bit for bit, and the newest must be at most `train.save_every` steps back. A run that comes to its
end must have ended as the undisturbed one did; the next kills meet a new one.

`tests/faults/` kills at chosen places of a save; this shows that no other place was forgotten.
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
_LIFE = 30
"""Steps within which a kill comes."""


@dataclass(frozen=True)
class Kill:
    """One kill, and what the run was by then."""

    started_from: int
    """The step the run went on from."""
    done: int
    """The last step whose numbers were written."""
    kept: int
    """The newest checkpoint's."""
    in_save: bool

    @property
    def lost(self) -> int:
        return max(self.done - self.kept, 0)


class Undisturbed:
    """A run that nothing happens to, which keeps all its checkpoints."""

    def __init__(self, folder: Path, dataset: Path) -> None:
        self.run = RunFolder(folder / "undisturbed")
        words = _words(self.run.path, dataset, keep=STEPS)
        start_ranks(folder / "ranks", ["--help"], ranks=1).wait()  # the first start alone imports everything
        start = time.monotonic()
        ranks = start_ranks(folder / "ranks", words, ranks=RANKS)
        while not _steps_done(self.run, 0):
            _check_alive(ranks)
            time.sleep(0.01)
        self.seconds_to_start = time.monotonic() - start
        _check_end(ranks)
        self.seconds_of_steps = time.monotonic() - start - self.seconds_to_start
        self.digests = {step: _digests(self.run, step) for step in self.run.steps()}

    def check(self, run: RunFolder) -> int:
        """The newest step of a run that was killed.

        Raises:
            CheckpointError: a checkpoint is broken.
            RuntimeError: one is not that of this run.
        """
        for step in run.steps():
            read_checkpoint(run.step_path(step))
            if _digests(run, step) != self.digests[step]:
                raise RuntimeError(f"the checkpoint of step {step} in {run.path} is not that of the undisturbed run")
        if (run.checkpoints / "best.json").exists():
            run.best()
        newest = run.newest()
        return newest.progress.step if newest else 0

    def check_end(self, run: RunFolder) -> None:
        """A run that came to its end has the same parameters, moments, best step and results.

        Raises:
            RuntimeError: it does not.
        """
        ends = [
            (found.steps()[-1], found.best().progress.step, [r.metrics for r in read(found.path / RESULTS_FILE)])
            for found in (run, self.run)
        ]
        if self.check(run) != STEPS or ends[0] != ends[1]:
            raise RuntimeError(f"{run.path} ended otherwise than the undisturbed run: {ends}")


def main() -> None:
    """Kill, check, print, write."""
    options = _parse()
    os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker"  # it is right: who is killed leaves semaphores behind
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
        "survived": len(kills),  # else there is no result
        "most_steps_lost": max(kill.lost for kill in kills),
        "steps_lost": dict(sorted(Counter(kill.lost for kill in kills).items())),
        "steps_run": sum(kill.done - kill.started_from for kill in kills),
        "runs_ended": ends,
        "ends_bit_for_bit_equal": ends,
        "seconds": round(time.monotonic() - start),
    }  # fmt: skip
    write(options.out, result)
    shutil.rmtree(folder)  # after a failure it stays, to look at
    _print(result)


def _kill_all(
    options: argparse.Namespace, folder: Path, dataset: Path, undisturbed: Undisturbed
) -> tuple[list[Kill], int]:
    """All kills, and how many runs came to their ends meanwhile, the last one undisturbed at last."""
    rng = random.Random(options.seed)
    kills: list[Kill] = []
    run, ends = RunFolder(folder / "run0"), 0
    while True:
        words = _words(run.path, dataset, keep=2)
        done = len(kills) == options.kills or time.monotonic() > options.until
        kill = None if done else _start_and_kill(folder / "ranks", words, run, undisturbed, rng)
        if kill:
            if kill.lost > SAVE_EVERY:
                raise RuntimeError(f"{kill.lost} steps of {run.path} were lost")
            kills.append(kill)
            print(f"kill {len(kills):2}: from step {kill.started_from} to {kill.done}, {kill.kept} kept"
                  f"{', in a save' if kill.in_save else ''}", flush=True)  # fmt: skip
            continue
        if done:
            _check_end(start_ranks(folder / "ranks", words, ranks=RANKS))
        undisturbed.check_end(run)
        ends += 1
        if done:
            return kills, ends
        run = RunFolder(folder / f"run{ends}")


def _start_and_kill(
    folder: Path, words: list[str], run: RunFolder, undisturbed: Undisturbed, rng: random.Random
) -> Kill | None:
    """One life of a run; None if it came to its end before its moment."""
    newest = run.newest()
    started_from = newest.progress.step if newest else 0
    there, lines = _being_written(run), _lines(run)
    step_seconds = undisturbed.seconds_of_steps / STEPS
    ranks = start_ranks(folder, words, ranks=RANKS)
    if rng.random() < 0.5:
        moment = time.monotonic() + rng.uniform(0, undisturbed.seconds_to_start + _LIFE * step_seconds)
        waits: Iterator[bool] = iter(lambda: time.monotonic() < moment, False)
    else:
        waits = _until_save(run, there, rng.randint(1, _LIFE // SAVE_EVERY), rng.uniform(0, 0.005))
    for _ in waits:
        if not _alive(ranks):
            _check_end(ranks)
            return None
        time.sleep(0.0005)
    ranks.kill()
    in_save = bool(_being_written(run).items() - there.items())
    done = _steps_done(run, lines) or started_from
    return Kill(started_from, done, undisturbed.check(run), in_save)


def _until_save(run: RunFolder, there: dict[str, int], count: int, seconds: float) -> Iterator[bool]:
    """Yields until `seconds` after the beginning of the save of that number."""
    seen: set[str] = set()
    while len(seen) < count:
        yield True
        seen |= {name for name, _ in _being_written(run).items() - there.items()}
    moment = time.monotonic() + seconds
    while time.monotonic() < moment:
        yield True


def _being_written(run: RunFolder) -> dict[str, int]:
    """Temporary folders of checkpoints and when they last changed: what an earlier kill left changes no more."""
    found = {}
    for path in run.checkpoints.glob(".writing-*"):
        try:
            found[path.name] = path.stat().st_mtime_ns
        except FileNotFoundError:
            continue  # it has got its name meanwhile
    return found


def _lines(run: RunFolder) -> int:
    file = run.path / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.is_file() else 0


def _steps_done(run: RunFolder, skip: int) -> int:
    """The last step that the run has written numbers of after its first `skip` lines; 0 if none."""
    file = run.path / "metrics.jsonl"
    whole = file.read_text().split("\n")[:-1] if file.is_file() else []
    steps = [line["step"] for line in map(json.loads, whole[skip:]) if "train/loss" in line]
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


def _words(output: Path, dataset: Path, *, keep: int) -> list[str]:
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
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--minutes", type=float, default=60, help="after which no further kill begins")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, default=RESULTS / "kills.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
