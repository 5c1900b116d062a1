"""Measure how fast batches are built, from tars to collated batches, and how memory grows with the dataset.

    python -m benchmarks.loader [--users 100000 1000000 10000000]

Compares one process with one and two loader processes, on synthetic datasets: shards of 6,250 users, shuffled over 16
shards at a time. Each measurement runs in a separate process, so that its peak memory is its own, over a whole epoch or
its first three million users. Ten million users take a few GB of disk, and of memory while they are written.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl

from benchmarks.common.machine import RESULTS, describe, peak_mib, write
from shards.build import BuildOptions, Dataset, write_dataset
from shards.hashing import hash_strings, stream_key
from shards.partitions.parts import LocalParts
from shards.partitions.split import AllSequences
from shards.sequences import Sequences
from shards.statistics import measure
from shards.writing.catalog import Catalog
from shards.writing.writer import plan_layout
from trainer.data.collators.sequences import SequenceCollator
from trainer.data.loader import StepLoader
from trainer.data.reading.dataset import open_dataset

_USERS_PER_SHARD = 6_250
_WORKERS = (0, 1, 2)
_MOST_USERS = 3_000_000  # timed per measurement
_DAY_MS = 86_400_000


def main() -> None:
    """Build, measure, print, write."""
    parser = argparse.ArgumentParser(prog="benchmarks.loader", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--users", type=int, nargs="+", default=[100_000, 1_000_000, 10_000_000], help="sizes of the datasets"
    )
    parser.add_argument("--items", type=int, default=20_000, help="items of the catalog")
    parser.add_argument("--out", type=Path, default=RESULTS / "loader.json")
    parser.add_argument("--measure", nargs=2, metavar=("DATASET", "WORKERS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(_measure(Path(options.measure[0]), int(options.measure[1]))))
        return
    sizes = {}
    for users in options.users:
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            dataset = write_random(Path(folder), users, options.items)
            print(f"{users:,} users written in {time.perf_counter() - began:.0f} s")
            sizes[f"{users:,} users"] = {
                f"{workers} workers": _in_own_process(dataset, workers) for workers in _WORKERS
            }
    result = {"machine": describe(), "items": options.items, "batch": 128, "sizes": sizes}
    write(options.out, result)
    _print(sizes)


def write_random(folder: Path, users: int, items: int) -> Path:
    """Write random sequences of 7 to 14 items in the format of `python -m shards build`.

    Not through `build` itself, which takes minutes to read the reviews of ten million users.
    """
    rng = np.random.default_rng(0)
    offsets = np.concatenate([[0], np.cumsum(rng.integers(5, 13, users))])
    gaps = rng.integers(_DAY_MS, 30 * _DAY_MS, offsets[-1])
    gaps[offsets[1:-1]] -= np.add.reduceat(gaps, offsets[:-1])[:-1]  # each user starts when the user before started
    times = gaps.cumsum()
    latest = times[offsets[1:] - 1]
    user_ids = pl.select(pl.format("u{}", pl.int_range(users))).to_series()
    item_ids = pl.select(pl.format("i{}", pl.int_range(items))).to_series()
    sequences = Sequences(
        user_ids=user_ids,
        user_keys=hash_strings(user_ids, stream_key(0, "users")),
        offsets=offsets,
        items=rng.integers(1, items + 1, offsets[-1], np.int32),
        times=times,
        valid_items=rng.integers(1, items + 1, users, np.int32),
        valid_times=latest + _DAY_MS,
        test_items=rng.integers(1, items + 1, users, np.int32),
        test_times=latest + 2 * _DAY_MS,
        tied_pairs=0,
    )
    catalog = pl.DataFrame({"item": pl.int_range(1, items + 1, dtype=pl.Int32, eager=True), "raw_id": item_ids})
    all_users = AllSequences(LocalParts([sequences]), users, item_ids, split_times=None)
    dataset = Dataset(
        all_users,
        Catalog(catalog.with_columns(title="raw_id"), missing_titles=0),
        measure(all_users.parts, (), items=items, duplicate_events=0, bad_times=0, missing_titles=0),
        plan_layout(users, max(users // _USERS_PER_SHARD, 1), None),
    )
    write_dataset(folder, dataset, BuildOptions("table", (), "synthetic", negatives=1, title_negatives=1))
    return folder


def _in_own_process(dataset: Path, workers: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.loader", "--measure", str(dataset), str(workers)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    measured: dict[str, float] = json.loads(done.stdout)
    return measured


def _measure(path: Path, workers: int) -> dict[str, float]:
    """Users per second, and the peak memory of this process (without its loader processes) and its growth, in MiB."""
    dataset = open_dataset(path, full_check=False)
    collator = SequenceCollator(dataset.num_items, max_history=128, negatives=1, fixed_length=False, seed=0)
    feed = StepLoader(dataset, collator, 128, 1, shuffle_shards=16, seed=0, workers=workers, rank=0, world_size=1)
    before = peak_mib()
    steps = feed.epoch(0)
    next(steps)  # warm-up: starts the loader processes and reads the first shards
    start, users = time.perf_counter(), 0
    for batches in steps:
        users += len(batches.user_U)
        if users >= _MOST_USERS:
            break
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
