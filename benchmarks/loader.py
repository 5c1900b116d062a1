"""How fast batches are made: users per second from tars to collated batches, and the memory that takes.

    python benchmarks/loader.py [--users 100000] [--out benchmarks/results/loader.json]

Compares one process with one and two loader processes on a synthetic dataset built for the occasion.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import tempfile
import time
from pathlib import Path

from shards.__main__ import main as shards_main
from shards.synthetic import write_world
from trainer.data.batches import SequenceCollator
from trainer.data.catalog import Dataset, open_dataset
from trainer.data.loader import Feed


def _measure(dataset: Dataset, workers: int) -> float:
    collator = SequenceCollator(dataset.num_items, max_history=128, negatives=1, fixed_length=False, seed=0)
    feed = Feed(dataset, collator, 128, 1, shuffle_shards=4, seed=0, workers=workers, rank=0, world_size=1)
    steps = feed.epoch(0)
    next(steps)  # the first batch pays for starting processes and reading the first shards
    start, users = time.perf_counter(), 0
    for batches in steps:
        users += len(batches.user_U)
    return users / (time.perf_counter() - start)


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    """Build, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--users", type=int, default=100_000)
    parser.add_argument("--items", type=int, default=20_000)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "loader.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        reviews, catalog = write_world(Path(folder) / "raw", users=options.users, items=options.items)
        words = f"--source table --time-unit ms --reviews {reviews} --meta {catalog} --shards 16 --name synthetic"
        if shards_main(["build", f"{folder}/data", *words.split()]):
            raise SystemExit(2)
        dataset = open_dataset(Path(folder) / "data", full_check=False)
        rates = {f"{workers} workers": round(_measure(dataset, workers)) for workers in (0, 1, 2)}
    result = {
        "machine": f"{_processor()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "users": dataset.manifest.num_users,
        "users_per_second": rates,
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
