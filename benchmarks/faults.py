"""What a run does when something fails: each fault, at rank 0 and at another, in each phase of a run.

    python -m benchmarks.faults [--only FAULT/RANK/PHASE ...] [--ranks 2]

Each cell is a real run of SASRec on a synthetic dataset, with dropout, under DeepSpeed on CPU ranks, without a launcher
that would end the others. It meets one fault (`benchmarks/common/inject.py`), is scored
(`benchmarks/common/fault_cells.py`), and is started again by the same command. Writes `benchmarks/faults.md` and
`benchmarks/results/faults.json`, in which cells that are not run now keep their last result. A full disk and a lost file
system are mounts and need root; without it these cells are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from benchmarks.common.fault_cells import FAULTS, PHASES, SAVE_EVERY, STEPS, TIMEOUT, Bench, Cell, run_cell
from benchmarks.common.machine import RESULTS, describe, write

_TABLE = Path(__file__).parent / "faults.md"


def main() -> None:
    """Run the cells, print each, write all."""
    options = _parse()
    os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker"  # killed processes do leave semaphores behind
    cells = [cell for cell in matrix(options.ranks) if any(_matches(cell, words) for words in options.only)]
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    bench = Bench(folder, options.ranks)
    results = json.loads(options.out.read_text())["cells"] if options.out.is_file() else {}
    for cell in cells:
        try:
            outcome = run_cell(bench, cell)
        except OSError as error:
            print(f"{cell.name}: left out, {error}", flush=True)
            continue
        results[cell.name] = asdict(outcome) | {"lost": outcome.lost}
        print(f"{cell.name}: {'; '.join(outcome.problems) or 'ok'}, {outcome.seconds} s, {outcome.lost} lost",
              flush=True)  # fmt: skip
        result = {"machine": describe(), "ranks": options.ranks, "cells": results}
        write(options.out, result)
        options.table.write_text(table(result))
    if not any(results[cell.name]["problems"] for cell in cells if cell.name in results):
        shutil.rmtree(folder)


def matrix(ranks: int) -> list[Cell]:
    """All cells; the other rank is the last one."""
    return [
        Cell(fault, rank, phase)
        for fault in FAULTS
        for rank in ([0] if fault.shared or ranks == 1 else [0, ranks - 1])
        for phase in PHASES
    ]


def table(result: Mapping[str, Any]) -> str:
    """The matrix as a page."""
    return json.dumps(result)


def _matches(cell: Cell, words: str) -> bool:
    parts = words.split("/")
    fault, rank, phase = cell.name.split("/")
    names = (fault, phase) if len(parts) == 2 else (fault, rank, phase)
    return all(fnmatch(name, part) for name, part in zip(names, parts, strict=False))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.faults", description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", default=["*"], metavar="FAULT/PHASE", help="or FAULT, or FAULT/RANK/PHASE")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "faults.json")
    parser.add_argument("--table", type=Path, default=_TABLE)
    return parser.parse_args()


if __name__ == "__main__":
    main()
