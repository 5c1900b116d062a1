"""Load a server with concurrent users, each of whom asks again as soon as the answer has come.

    python -m benchmarks.serving runs/quickstart/sasrec --users 1 10 100 1000
    python -m benchmarks.serving runs/quickstart/llm_srec --users 1 8 64

The server is the real command in a process of its own; all users are in this one, which shares the machine with it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np

import trainer
from benchmarks.common.machine import RESULTS, describe, write

_ROOT = Path(__file__).parents[1]
_READY = re.compile(r"http://([\d.]+):(\d+)")


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="benchmarks.serving", description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="export or run folder")
    parser.add_argument("--users", type=int, nargs="+", default=[1, 10, 100, 1000], help="concurrent users")
    parser.add_argument("--seconds", type=float, default=20.0, help="per number of users, after a fifth of that")
    parser.add_argument("--history", type=int, nargs=2, default=[5, 50], help="items of a history, from and to")
    parser.add_argument("--out", type=Path, default=RESULTS / "serving.json")
    parser.add_argument("--serve", default="", help="options of `serve`, in one word: '--threads 1 --batch 8'")
    options = parser.parse_args()
    _allow_files(4 * max(options.users) + 100)
    bodies = _bodies(options.run, *options.history)
    before = os.getloadavg()[0]
    with _server(options.run, shlex.split(options.serve)) as (process, address):
        rows = {str(users): _measure(process.pid, address, users, bodies, options.seconds) for users in options.users}
        peak = _peak_mib(process.pid)
        health = json.load(urlopen(f"http://{address[0]}:{address[1]}/health"))
    found = json.loads(options.out.read_text()) if options.out.is_file() else {}
    key = f"{health['system']} on {health['dataset']}"
    result = {"machine": describe(), "load_before": round(before, 1), "items": health["items"]}
    result |= {"history": options.history, "serve": options.serve, "server_mib": round(peak), "users": rows}
    write(options.out, {**found, key: result})
    print(f"{key}: {result['machine']}, load {before:.1f} before; server {peak:.0f} MiB")
    print("| users | requests/s | median ms | p99 ms | requests per batch | CPU ms per request | not answered |")
    for users, row in rows.items():
        cells = [str(row[name]) for name in ("per_second", "p50_ms", "p99_ms", "batch", "cpu_ms", "failed")]
        print(f"| {users} | {' | '.join(cells)} |")


class _server:  # noqa: N801 - a context manager, as a function would be
    """The real command, on a free port."""

    def __init__(self, run: Path, options: Sequence[str]) -> None:
        command = [sys.executable, "-m", "launchers.serve", str(run.absolute()), "--port", "0", *options]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=_ROOT)

    def __enter__(self) -> tuple[subprocess.Popen[str], tuple[str, int]]:
        assert self._process.stdout is not None
        match = _READY.search(self._process.stdout.readline())
        assert match, "the server did not start: its error is above"
        return self._process, (match[1], int(match[2]))

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(60)


def _bodies(run: Path, shortest: int, longest: int) -> list[bytes]:
    """Requests with histories of random items, by raw id."""
    ids = trainer.load_run(run).items.ids
    generator = np.random.default_rng(0)
    lengths = generator.integers(shortest, longest, 1000, endpoint=True)
    return [json.dumps({"history": [ids[i] for i in generator.integers(len(ids), size=n)]}).encode() for n in lengths]


@dataclass
class _Seen:
    """What the users of a measurement saw."""

    latency: list[float] = field(default_factory=list)
    status: Counter[int] = field(default_factory=Counter)


def _measure(
    server: int, address: tuple[str, int], users: int, bodies: Sequence[bytes], seconds: float
) -> dict[str, Any]:
    before, cpu = _metrics(address), _cpu_seconds(server)
    seen = asyncio.run(_ask_all(address, users, bodies, seconds))
    cpu = _cpu_seconds(server) - cpu
    after = _metrics(address)
    batches = after["llm_srec_batch_size_count"] - before["llm_srec_batch_size_count"]
    asked = after["llm_srec_batch_size_sum"] - before["llm_srec_batch_size_sum"]
    model = after["llm_srec_batch_seconds_sum"] - before["llm_srec_batch_seconds_sum"]
    p50, p99 = np.percentile(seen.latency, [50, 99]) * 1000
    return {
        "per_second": round(len(seen.latency) / seconds, 1),
        "p50_ms": round(float(p50), 1),
        "p99_ms": round(float(p99), 1),
        "batch": round(asked / batches, 1),
        "model_ms": round(1000 * model / asked, 2),
        "cpu_ms": round(1000 * cpu / asked, 2),
        "failed": sum(count for status, count in seen.status.items() if status != 200),
        "load": round(os.getloadavg()[0], 1),
    }


async def _ask_all(address: tuple[str, int], users: int, bodies: Sequence[bytes], seconds: float) -> _Seen:
    seen = _Seen()
    begin = time.perf_counter() + seconds / 5  # connecting and warming up is not measured
    end = begin + seconds
    await asyncio.gather(*(_ask(address, bodies[user % len(bodies) :], begin, end, seen) for user in range(users)))
    return seen


async def _ask(address: tuple[str, int], bodies: Sequence[bytes], begin: float, end: float, seen: _Seen) -> None:
    """One user: a connection that is kept, and one request after the other."""
    reader, writer = await asyncio.open_connection(*address)
    turn = 0
    while (started := time.perf_counter()) < end:
        body = bodies[turn % len(bodies)]
        head = f"POST /recommend HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
        writer.write(head.encode() + b"\r\n\r\n" + body)
        status = await _status(reader)
        done = time.perf_counter()
        if begin <= done <= end:
            seen.status[status] += 1
            if status == 200:
                seen.latency.append(done - started)
        turn += 1
    writer.close()


async def _status(reader: asyncio.StreamReader) -> int:
    """Read an answer; returns its status."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
    await reader.readexactly(length)
    return int(head.split(maxsplit=2)[1])


def _metrics(address: tuple[str, int]) -> dict[str, float]:
    text = urlopen(f"http://{address[0]}:{address[1]}/metrics").read().decode()
    pairs = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


def _cpu_seconds(process: int) -> float:
    """CPU seconds of a process so far: what a request costs, however busy the machine is."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _peak_mib(process: int) -> float:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) / 1024


def _allow_files(wanted: int) -> None:
    """Raise the limit of open files, for one connection per user in each process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(soft, wanted), hard), hard))


if __name__ == "__main__":
    main()
