"""Measure what the prefetching thread saves: steps whose batches are built in turn or meanwhile.

    python -m benchmarks.prefetch [--step 0.005]

SASRec batches of 128 users of a synthetic dataset; the step itself is a pause, as for a process whose device computes.
Both ways run in turns of 200 steps; medians of five turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.common.machine import RESULTS, describe, write
from benchmarks.loader import write_random
from trainer.data.collators.sequences import SequenceCollator
from trainer.data.loader import StepLoader
from trainer.data.reading.dataset import open_dataset

_STEPS, _TURNS = 200, 5


def main() -> None:
    """Build, measure, print, write."""
    parser = argparse.ArgumentParser(prog="benchmarks.prefetch", description=__doc__.split("\n")[0])
    parser.add_argument("--users", type=int, default=100_000)
    parser.add_argument("--step", type=float, default=0.005, help="seconds that the device computes")
    parser.add_argument("--out", type=Path, default=RESULTS / "prefetch.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        dataset = open_dataset(write_random(Path(folder), options.users, items=20_000), full_check=False)
        collator = SequenceCollator(dataset.num_items, max_history=128, negatives=1, fixed_length=False, seed=0)
        feed = StepLoader(dataset, collator, 128, 1, shuffle_shards=16, seed=0, workers=0, rank=0, world_size=1)
        turns = [
            (_seconds(islice(feed.epoch(0), _STEPS), options.step), _seconds(feed.steps(0, _STEPS), options.step))
            for _ in range(_TURNS)
        ]
    in_turn, meanwhile = (statistics.median(seconds) for seconds in zip(*turns, strict=True))
    result = {
        "machine": describe(),
        "step_ms": 1000 * options.step,
        "in_turn_ms": round(1000 * in_turn / _STEPS, 2),
        "thread_ms": round(1000 * meanwhile / _STEPS, 2),
        "times_as_fast": round(in_turn / meanwhile, 2),
    }
    write(options.out, result)
    print(json.dumps(result, indent=1))


def _seconds(steps: Iterator[Any], step_seconds: float) -> float:
    began = time.perf_counter()
    for _ in steps:
        time.sleep(step_seconds)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
