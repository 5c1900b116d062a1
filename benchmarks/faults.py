"""The fault matrix: each fault, at rank 0 and at another, in each phase of a run.

    python -m benchmarks.faults [--only FAULT/RANK/PHASE ...] [--ranks 2]

Each cell is a real run of SASRec on a synthetic dataset, with dropout, under DeepSpeed on CPU ranks, without a launcher
that would end the others. It meets one fault (`benchmarks/common/inject.py`), is scored
(`benchmarks/common/fault_cells.py`), and is started again by the same command. Writes `benchmarks/faults.md` and
`benchmarks/results/faults.json`, in which cells that are not run now keep their last result. A full disk and a lost
file system are mounts and need root; without it these cells are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
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
    cells = chosen(matrix(options.ranks), options.only)
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


def chosen(cells: Sequence[Cell], patterns: Sequence[str]) -> list[Cell]:
    """Cells that match a pattern: `FAULT`, `FAULT/PHASE` or `FAULT/RANK/PHASE`, with wildcards.

    Raises:
        SystemExit: a pattern matches none.
    """
    found = []
    for pattern in patterns:
        parts = pattern.split("/")
        names = [cell.name.split("/") for cell in cells]
        names = [[fault, phase] if len(parts) == 2 else [fault, rank, phase] for fault, rank, phase in names]
        fits = [all(map(fnmatch, name, parts)) for name in names]
        if not any(fits):
            raise SystemExit(f"no cell is called {pattern}; one is {cells[0].name}")
        found += [cell for cell, fit in zip(cells, fits, strict=True) if fit and cell not in found]
    return found


def table(result: Mapping[str, Any]) -> str:
    """The matrix as a page."""
    cells: Mapping[str, Any] = result["cells"]
    rows = [f"| fault | rank | {' | '.join(PHASES)} |", "|---|---|" + "---:|" * len(PHASES)]
    for fault in FAULTS:
        for rank in dict.fromkeys(name.split("/")[1] for name in cells if name.startswith(f"{fault.name}/")):
            shown = [_shown(cells.get(f"{fault.name}/{rank}/{phase}"), fault.name) for phase in PHASES]
            rows.append(f"| {fault.name} | {rank} | {' | '.join(shown)} |")
    said = [f"| {fault.name} | {_said(cells, fault.name)} |" for fault in FAULTS]
    bad = [f"* {name}: {'; '.join(cell['problems'])}" for name, cell in cells.items() if cell["problems"]]
    sound = f"All {len(cells)} cells are sound." if not bad else "Not sound:\n\n" + "\n".join(bad)
    return _PAGE.format(
        machine=result["machine"], ranks=result["ranks"], rows="\n".join(rows), said="\n".join(said), sound=sound,
        steps=STEPS, save=SAVE_EVERY, timeout=TIMEOUT, slow=10 * TIMEOUT,
    )  # fmt: skip


_PAGE = """# What a run does when something fails

Written by `python -m benchmarks.faults` ([the script](faults.py), [what is injected](common/inject.py), [how a cell
is scored](common/fault_cells.py)); all figures and messages are in `results/faults.json`. With other work on the same
cores of this machine: {machine}.

Each cell is a real run of SASRec under DeepSpeed on {ranks} CPU ranks, {steps} steps with a checkpoint every {save},
that meets one fault, and is then started again by the same command. No launcher ends the other ranks, as `deepspeed`
and `srun` would. The watchdog waits {timeout:g} s at one place (`engine.timeout`; 300 by default), and {slow:g} s in
the first step, in a validation and in the test.

{rows}

{sound}

**A cell** has the seconds from the fault to the end of the last process, and the steps that have to be repeated. It
is in bold, with the reason, unless

* every process ends by itself, those that guard ranks too, and with an exit code that is not 0 on one rank at least;
* an error names the right rank, and the cause, as below;
* at most the {save} steps since the last checkpoint are lost, but on a full disk, where the run continues and warns at
  each checkpoint that it cannot write;
* the same command then resumes from the newest checkpoint, and ends with the weights, moments and test results of a
  run without faults, bit for bit.

`continues`: the run survives the fault and ends so itself. A dash: not run.

**Phases.** `start`: of a run that resumes, dataset and weights are loaded; `step`: in the forward pass; `save`:
between the files of a checkpoint on rank 0, where the others gather weights; `validation`, and `end`, the final test:
while users are ranked. `rank`: 0, which writes all files, or the last one; `any`: what all share.

**Faults.** `kill`: SIGKILL, as the kernel's when memory runs out; `segv`: a null pointer is read; `stop`: SIGSTOP, as
by a frozen node; `held lock`: C code that never gives the interpreter lock back; `exception`: a bug; `exit 0`: the
process leaves without a word; `NaN`: in one element of all weights and moments of the rank, as from broken memory;
`slow rank`: 0.15 s more at each wait of the phase, which is looked for in steps only; `full disk`: no byte is left
where the run folder is, and some again before the second start; `lost file system`: that of dataset and run folder is
unmounted, and mounted again before the second start.

## What is said

| fault | by the run |
|---|---|
{said}
"""


def _shown(cell: Mapping[str, Any] | None, fault: str) -> str:
    if cell is None:
        return "–"
    if not any(cell["codes"]) and not cell["problems"]:
        return "continues"
    figures = f"{cell['seconds']:g} s, {cell['lost']}"
    return f"{figures} **{'; '.join(cell['problems'])}**" if cell["problems"] else figures


def _said(cells: Mapping[str, Any], fault: str) -> str:
    """What was said of the fault in a step, at the last rank that met it: the first error, else the first warning."""
    found = [cell["said"] for name, cell in cells.items() if name.startswith(f"{fault}/") and name.endswith("/step")]
    lines = sorted((found[-1] if found else "").splitlines(), key=lambda line: "error: " not in line)  # stable
    return f"`{_TIME.sub('', lines[0]).replace('|', ' ')}`" if lines else ""


_TIME = re.compile(r"^\d\d:\d\d:\d\d ")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.faults", description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", default=["*"], metavar="FAULT/PHASE", help="or FAULT, or FAULT/RANK/PHASE")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "faults.json")
    parser.add_argument("--table", type=Path, default=_TABLE)
    return parser.parse_args()


if __name__ == "__main__":
    main()
