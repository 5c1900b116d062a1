"""How fast batches are made, from tars to collated batches, and that memory does not grow with the dataset.

    python -m benchmarks.loader [--users 100000 1000000]     10000000 too, given some GB of disk and ten minutes

Compares one process with one and two loader processes, on synthetic datasets built for the occasion: shards of 6,250
users, shuffled over 16 at a time. Each measurement runs in a process of its own, so that its peak is its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.machine import RESULTS, describe, peak_mib, write
from benchmarks.setting import synthetic_dataset
from trainer.data.batches import SequenceCollator
from trainer.data.catalog import open_dataset
from trainer.data.loader import Feed

_USERS_A_SHARD = 6_250
_WORKERS = (0, 1, 2)


def main() -> None:
    """Build, measure, print, write."""
    parser = argparse.ArgumentParser(prog="benchmarks.loader", description=__doc__.split("\n")[0])
    parser.add_argument("--users", type=int, nargs="+", default=[100_000, 1_000_000], help="sizes of the datasets")
    parser.add_argument("--items", type=int, default=20_000)
    parser.add_argument("--out", type=Path, default=RESULTS / "loader.json")
    parser.add_argument("--measure", nargs=2, metavar=("DATASET", "WORKERS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(_measure(Path(options.measure[0]), int(options.measure[1]))))
        return
    sizes = {}
    for users in options.users:
        with tempfile.TemporaryDirectory() as folder:
            words = f"--negatives 1 --shards {max(users // _USERS_A_SHARD, 1)}"
            dataset = synthetic_dataset(Path(folder), users=users, items=options.items, words=words)
            sizes[f"{users:,} users"] = {
                f"{workers} workers": _in_own_process(dataset, workers) for workers in _WORKERS
            }
    result = {"machine": describe(), "items": options.items, "batch": 128, "sizes": sizes}
    write(options.out, result)
    _print(sizes)


def _in_own_process(dataset: Path, workers: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.loader", "--measure", str(dataset), str(workers)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    measured: dict[str, float] = json.loads(done.stdout)
    return measured


def _measure(path: Path, workers: int) -> dict[str, float]:
    """Users per second over one epoch, and the most memory of this process (not of its workers) before and after."""
    dataset = open_dataset(path, full_check=False)
    collator = SequenceCollator(dataset.num_items, max_history=128, negatives=1, fixed_length=False, seed=0)
    feed = Feed(dataset, collator, 128, 1, shuffle_shards=16, seed=0, workers=workers, rank=0, world_size=1)
    before = peak_mib()
    steps = feed.epoch(0)
    next(steps)  # the first batch pays for starting processes and reading the first shards
    start, users = time.perf_counter(), 0
    for batches in steps:
        users += len(batches.user_U)
    rate = users / (time.perf_counter() - start)
    return {
        "users_per_second": round(rate),
        "growth_mib": round(peak_mib() - before),
        "peak_mib": round(peak_mib()),
    }


def _print(sizes: dict[str, dict[str, dict[str, float]]]) -> None:
    print(f"{'':20} {'':10} {'users/s':>10} {'growth':>10} {'peak':>10}")
    for users, by_workers in sizes.items():
        for workers, row in by_workers.items():
            print(f"{users:20} {workers:10} {row['users_per_second']:10,.0f} {row['growth_mib']:6,.0f} MiB "
                  f"{row['peak_mib']:6,.0f} MiB")  # fmt: skip


if __name__ == "__main__":
    main()
