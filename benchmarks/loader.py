"""Measure how fast batches are built, from tars to collated batches, and how memory grows with the dataset.

    python -m benchmarks.loader [--users 100000 1000000 10000000]

Compares one process with one and two loader processes, and with two and four ranks, on synthetic datasets: shards of
6,250 users, shuffled over 16 shards at a time. Each rank is a separate process, so that its peak memory is its own, and
reads a whole epoch or its first million users. Seconds to the first batch are those from opening the dataset. Ten
million users take a few GB of disk, and of memory while they are written.
"""

from __future__ import annotations

import argparse
import json
import os
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
_CASES = ((1, 0), (1, 1), (1, 2), (2, 0), (4, 0))
"""Ranks, and loader processes of each."""
_MOST_USERS = 1_000_000  # timed per rank
_DAY_MS = 86_400_000


def main() -> None:
    """Build, measure, print, write."""
    parser = argparse.ArgumentParser(prog="benchmarks.loader", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--users", type=int, nargs="+", default=[100_000, 1_000_000, 10_000_000], help="sizes of the datasets"
    )
    parser.add_argument("--items", type=int, default=20_000, help="items of the catalog")
    parser.add_argument("--out", type=Path, default=RESULTS / "loader.json")
    parser.add_argument("--measure", nargs=4, metavar=("DATASET", "RANK", "RANKS", "WORKERS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        path, *numbers = options.measure
        print(json.dumps(_measure(Path(path), *map(int, numbers))))
        return
    sizes: dict[str, dict[str, dict[str, float]]] = {}
    for users in options.users:
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            dataset = write_random(Path(folder), users, options.items)
            print(f"{users:,} users written in {time.perf_counter() - began:.0f} s")
            sizes[f"{users:,} users"] = {
                f"{ranks} ranks, {workers} workers": _in_own_processes(dataset, ranks, workers)
                for ranks, workers in _CASES
            }
    result = {"machine": describe(), "items": options.items, "batch": 128, "load": os.getloadavg(), "sizes": sizes}
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


def _in_own_processes(dataset: Path, ranks: int, workers: int) -> dict[str, float]:
    """Users per second of all ranks together, which read at the same time; the most seconds and memory of a rank."""
    command = [sys.executable, "-m", "benchmarks.loader", "--measure", str(dataset)]
    running = [
        subprocess.Popen([*command, *map(str, (rank, ranks, workers))], stdout=subprocess.PIPE, text=True)
        for rank in range(ranks)
    ]
    found = [json.loads(process.communicate()[0]) for process in running]
    assert not any(process.returncode for process in running), "a rank failed"
    return {name: (sum if name == "users_per_second" else max)(rank[name] for rank in found) for name in found[0]}


def _measure(path: Path, rank: int, ranks: int, workers: int) -> dict[str, float]:
    """Users per second, seconds to the first batch, and the peak memory of this process (without its loader processes)
    and its growth, in MiB."""
    before, start = peak_mib(), time.perf_counter()
    dataset = open_dataset(path, full_check=False)
    collator = SequenceCollator(dataset.num_items, max_history=128, negatives=1, fixed_length=False, seed=0)
    feed = StepLoader(
        dataset, collator, 128, 1, shuffle_shards=16, seed=0, workers=workers, rank=rank, world_size=ranks
    )
    steps = feed.epoch(0)
    next(steps)
    first_batch = time.perf_counter() - start
    start, users = time.perf_counter(), 0
    for batches in steps:
        users += len(batches.user_U)
        if users >= _MOST_USERS:
            break
    return {
        "users_per_second": round(users / (time.perf_counter() - start)),
        "first_batch_seconds": round(first_batch, 2),
        "growth_mib": round(peak_mib() - before),
        "peak_mib": round(peak_mib()),
    }


def _print(sizes: dict[str, dict[str, dict[str, float]]]) -> None:
    print(f"{'':20} {'':20} {'users/s':>10} {'first batch':>12} {'growth':>10} {'peak':>10}")
    for users, cases in sizes.items():
        for case, row in cases.items():
            print(
                f"{users:20} {case:20} {row['users_per_second']:10,.0f} {row['first_batch_seconds']:10.1f} s "
                f"{row['growth_mib']:6,.0f} MiB {row['peak_mib']:6,.0f} MiB"
            )


if __name__ == "__main__":
    main()
