"""SASRec on next week's data, from scratch and from last week's run: numbers of [warm_start.md](warm_start.md).

    python -m benchmarks.warm_start data                    # two datasets from MovieLens-100k, cut by time
    python -m benchmarks.warm_start run last_week scratch warm warm_low_lr --seeds 0 1 2
    python -m benchmarks.warm_start table

A run that is stopped resumes. *Last week* has the events before the cut, *next week* all of them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import trainer
from benchmarks.common.machine import RESULTS, describe, write
from shards.__main__ import main as shards
from shards.readers.demo import movielens_files
from trainer.reports.results import read

FOLDER = Path("runs/warm_start")
CUT = 0.9
"""Share of the events, in order of time, that last week's dataset has."""
METRIC = "NDCG@10"
COMMON = ("train.patience=8", "engine.threads=1")
_LAST_WEEK = "{folder}/last_week-{seed}"

RUNS: dict[str, tuple[str, ...]] = {
    "last_week": ("data.path={folder}/data/last_week",),
    "scratch": ("data.path={folder}/data/next_week",),
    "warm": ("data.path={folder}/data/next_week", f"train.init_from={_LAST_WEEK}"),
    "warm_low_lr": ("data.path={folder}/data/next_week", f"train.init_from={_LAST_WEEK}", "train.lr=3e-4"),
}
"""Settings by which each run differs from the preset `quickstart_sasrec`."""


def main() -> None:
    """Build, run or tabulate."""
    parser = argparse.ArgumentParser(prog="benchmarks.warm_start", description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("data", "run", "table"))
    parser.add_argument("runs", nargs="*", metavar="RUN", help=f"of {', '.join(RUNS)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    if options.what == "data":
        build()
    elif options.what == "run":
        for seed in options.seeds:
            for name in options.runs or RUNS:
                run(name, seed)
    else:
        table(options.seeds)


def build() -> None:
    """Build both datasets from the events before the cut, and from all."""
    inter, item = movielens_files()
    data = FOLDER / "data"
    data.mkdir(parents=True, exist_ok=True)
    header, *events = inter.read_text().splitlines()
    events.sort(key=lambda line: int(line.split("\t")[3]))
    for name, part in (("last_week", events[: int(len(events) * CUT)]), ("next_week", events)):
        (data / f"{name}.inter").write_text("\n".join([header, *part]) + "\n")
        source = f"--source recbole --reviews {data / name}.inter --meta {item}"
        assert shards(f"build {data / name} {source} --name {name}".split()) == 0


def run(name: str, seed: int) -> None:
    """Train one run, and test it."""
    words = [word.format(folder=FOLDER, seed=seed) for word in RUNS[name]]
    trainer.train("quickstart_sasrec", [*words, f"output={FOLDER}/{name}-{seed}", f"seed={seed}", *COMMON])


def table(seeds: Sequence[int]) -> None:
    """Write what the finished runs reached, and print it."""
    rows: dict[str, Any] = {}
    for name in ("scratch", "warm", "warm_low_lr"):  # not last week's, whose users are others
        found = [_reached(FOLDER / f"{name}-{seed}", FOLDER / f"scratch-{seed}") for seed in seeds]
        rows[name] = {key: [row[key] for row in found] for key in found[0]}
    report = json.loads((FOLDER / f"warm-{seeds[0]}" / "warm_start.json").read_text())
    write(RESULTS / "warm_start.json", {"machine": describe(), "seeds": list(seeds), "report": report, "runs": rows})
    for name, row in rows.items():
        means = {key: f"{np.mean(values):.4g}" for key, values in row.items() if None not in values}
        print(name, means)


def _reached(run: Path, scratch: Path) -> dict[str, Any]:
    """Test result and best step, and the first validated step at which the run was as good as the best from scratch."""
    curve, wanted = _validations(run), max(value for _, value in _validations(scratch))
    [test] = [result for result in read(run / "results.jsonl") if result.history == "original"]
    return {
        "test": test.metrics[METRIC].value,
        "best_step": test.step,
        "first_validation": curve[0][1],
        "best_validation": max(value for _, value in curve),
        "step_as_good_as_scratch": next((step for step, value in curve if value >= wanted), None),
        "step_99_percent": next((step for step, value in curve if value >= 0.99 * wanted), None),
    }


def _validations(run: Path) -> list[tuple[int, float]]:
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(record["step"], record[f"valid/{METRIC}"]) for record in records if f"valid/{METRIC}" in record]


if __name__ == "__main__":
    main()
