"""Measure how fast datasets are built and read, and how much memory that takes.

    python -m benchmarks.data [--events 1000000 10000000] [--workers 1 2] [--engines]

Events are a synthetic log in the order of time, in parquet files of five million: ten events per user and one hundred
per item on average, both long-tailed, with ids as long as Amazon's. Each measurement runs in a process of its own.
`--engines` also runs the heavy steps of a build (distinct events, k-core filter, order with seeded ties) as queries of
polars' streaming engine and of duckdb, if that is installed.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from benchmarks.common.machine import RESULTS, describe, peak_mib, write
from shards.build import BuildOptions, build
from shards.manifest import read_manifest
from shards.splitmix import mix

_FILE_EVENTS = 5_000_000
_START_MS, _SPAN_MS = 1_500_000_000_000, 10**11
_DUCKDB = """
create temp table events as select distinct "user", item, time from read_parquet('{logs}/*.parquet');
create temp table core as select * from events
    semi join (select "user" from events group by "user" having count(*) >= 5) as users using ("user")
    semi join (select item from events group by item having count(*) >= 5) as items using (item);
copy (select hash("user") as key, "user", item, time from core qualify count(*) over (partition by "user") >= 7
    order by key, "user", time, hash("user", item, time), item) to '{out}' (compression zstd);
"""


def main() -> None:
    """Write logs, build, read, print, write."""
    parser = argparse.ArgumentParser(prog="benchmarks.data", description=__doc__.split("\n")[0])
    parser.add_argument("--events", type=int, nargs="+", default=[1_000_000, 10_000_000], help="sizes of the logs")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="processes of a build")
    parser.add_argument("--engines", action="store_true", help="also run the heavy steps in polars and duckdb")
    parser.add_argument("--folder", type=Path, help="where logs and datasets are written (default: a temporary folder)")
    parser.add_argument("--out", type=Path, default=RESULTS / "data.json")
    parser.add_argument("--measure", nargs=2, metavar=("WHAT", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        what, folder = options.measure
        name, *numbers = what.split()
        print(json.dumps(_MEASURED[name](Path(folder), *map(int, numbers))))
        return
    sizes: dict[str, Any] = {}
    for events in options.events:
        with tempfile.TemporaryDirectory(dir=options.folder) as name:
            write_log(Path(name) / "logs", events)
            builds = [f"build {workers}" for workers in options.workers]
            steps = [*builds, "read", *(["polars", "duckdb"] if options.engines else [])]
            sizes[f"{events:,} events"] = {step: _in_own_process(step, Path(name)) for step in steps}
            print(json.dumps(sizes, indent=1))
    write(options.out, {"machine": describe(), "load": os.getloadavg(), "sizes": sizes})


def write_log(folder: Path, events: int) -> None:
    """Write a log in the order of time as parquet files of `_FILE_EVENTS`."""
    folder.mkdir(parents=True)
    users, items = events // 10, max(events // 100, 10_000)
    for first in range(0, events, _FILE_EVENTS):
        rng = np.random.default_rng((0, first))
        number = min(_FILE_EVENTS, events - first)
        user = (users * rng.random(number) ** 1.5).astype(np.uint64)
        item = (items * rng.random(number) ** 3).astype(np.int64)
        # Whole seconds, so that some events of a user share their time.
        at = _START_MS + (first + np.arange(number)) * (_SPAN_MS // events) // 1000 * 1000
        pl.DataFrame({"user": mix(user + np.uint64(1)), "item": item, "time": at}).with_columns(
            pl.format("user-{}", "user"), pl.format("B{}", pl.col("item").cast(pl.String).str.zfill(9))
        ).write_parquet(folder / f"part-{first // _FILE_EVENTS:03d}.parquet")


def _in_own_process(what: str, folder: Path) -> dict[str, float | str]:
    command = [sys.executable, "-m", "benchmarks.data", "--measure", what, str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    measured: dict[str, float | str] = json.loads(done.stdout)
    return measured


def _timed(work: Callable[[], object]) -> dict[str, float | str]:
    """Seconds, CPU seconds with those of child processes, and peak memory in MiB, also of the largest child."""
    began, cpu = time.perf_counter(), time.process_time()
    work()
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "seconds": round(time.perf_counter() - began, 1),
        "cpu_seconds": round(time.process_time() - cpu + children.ru_utime + children.ru_stime, 1),
        "peak_mib": round(peak_mib()),
        "child_peak_mib": children.ru_maxrss >> 10,
    }


def _build(folder: Path, workers: int) -> dict[str, float | str]:
    logs = tuple(sorted((folder / "logs").glob("*.parquet")))
    options = BuildOptions("table", logs, "log", missing_title="official")
    found = _timed(lambda: build(folder / "data", options, overwrite=True, workers=workers))
    manifest = read_manifest(folder / "data")
    events = manifest.statistics.stages[0].interactions
    tars = sum(shard.bytes for shard in manifest.shards)
    return found | {
        "fingerprint": manifest.fingerprint,
        "events_per_second": round(events / float(found["seconds"])),
        "events_per_cpu_second": round(events / float(found["cpu_seconds"])),
        "users": manifest.num_users,
        "tar_bytes_per_user": round(tars / manifest.num_users, 1),
        "tar_bytes_per_event": round(tars / manifest.statistics.interactions, 2),
        "candidate_bytes_per_user": round(
            sum(entry.bytes for entry in manifest.files if "candidates" in entry.name) / manifest.num_users
        ),
    }


def _read(folder: Path) -> dict[str, float | str]:
    """An epoch of batches of users, without collation."""
    from trainer.data.reading.shards import epoch_batches  # brings torch, which the other measurements do without

    manifest = read_manifest(folder / "data")

    def epoch() -> None:
        batches = epoch_batches(folder / "data", manifest, batch_size=1024, shuffle_shards=16, seed=0, epoch=0)
        assert sum(len(users) for users in batches) == manifest.num_users, "an epoch has every user"

    before = peak_mib()
    found = _timed(epoch)
    return found | {
        "growth_mib": round(peak_mib() - before),
        "users_per_second": round(manifest.num_users / float(found["seconds"])),
        "users_per_cpu_second": round(manifest.num_users / float(found["cpu_seconds"])),
    }


def _polars(folder: Path) -> dict[str, float | str]:
    def steps() -> None:
        pl.scan_parquet(folder / "logs/*.parquet").unique(["user", "item", "time"]).sink_parquet(folder / "distinct")
        events = pl.scan_parquet(folder / "distinct")
        for side in ("user", "item"):
            enough = pl.scan_parquet(folder / "distinct").group_by(side).len().filter(pl.col("len") >= 5)
            events = events.join(enough, on=side, how="semi")
        events.sink_parquet(folder / "core")
        core = pl.scan_parquet(folder / "core")
        trained = core.group_by("user").len().filter(pl.col("len") >= 7)
        tie = pl.struct("user", "item", "time").hash()
        core.join(trained, on="user", how="semi").sort(pl.col("user").hash(), "user", "time", tie, "item").sink_parquet(
            folder / "polars"
        )

    return _timed(steps)


def _duckdb(folder: Path) -> dict[str, float | str]:
    import duckdb

    settings = {"threads": 2, "memory_limit": "3GB", "temp_directory": str(folder / "spilled")}
    database = duckdb.connect(config=settings | {"preserve_insertion_order": False})
    return _timed(lambda: database.execute(_DUCKDB.format(logs=folder / "logs", out=folder / "duckdb")))


_MEASURED: dict[str, Callable[..., dict[str, float | str]]] = {
    "build": _build,
    "read": _read,
    "polars": _polars,
    "duckdb": _duckdb,
}


if __name__ == "__main__":
    main()
