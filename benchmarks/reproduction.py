"""Collect results of the paper's experiments for [reproduction](reproduction/README.md) and [quality.md](quality.md).

    python -m benchmarks.reproduction copy                # results of finished experiments -> benchmarks/reproduction/
    python -m benchmarks.reproduction quality             # one table of all systems, in Markdown
    python -m benchmarks.reproduction runs                # every run behind them: length, minutes, best step

Trains nothing: `launchers/experiment.py NAME --data data/ml-100k --recipe movielens` does.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from benchmarks.common.trained import test_results
from trainer.runs.folder import RunFolder
from trainer.workflows.experiments.paper import paper_values

HERE = Path(__file__).parent / "reproduction"
RESULTS = Path("runs/experiments/results")
FILES = ("table.md", "table.csv", "picture.svg", "cases.md")
PAPER_DATASETS = ("Movies", "Scientific", "Electronics", "CDs")

Json = dict[str, Any]


def main() -> None:
    """Copy or tabulate."""
    parser = argparse.ArgumentParser(prog="benchmarks.reproduction", description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("copy", "quality", "runs"))
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"results of experiments (default: {RESULTS})")
    options = parser.parse_args()
    found = {file.parent.name: json.loads(file.read_text()) for file in sorted(options.results.glob("*/results.json"))}
    if not found:
        parser.error(f"{options.results} holds no results: run launchers/experiment.py first")
    if options.what == "copy":
        _copy(options.results, found)
    else:
        print("\n".join(_quality(found) if options.what == "quality" else _runs(found)))


def _copy(folder: Path, found: dict[str, Json]) -> None:
    for name in found:
        target = HERE / name.removesuffix("-ml-100k")
        target.mkdir(parents=True, exist_ok=True)
        for file in FILES:
            if (folder / name / file).is_file():
                shutil.copyfile(folder / name / file, target / file)


def _quality(found: dict[str, Json]) -> list[str]:
    """Table 6 with shuffled inference, titles, minutes, and each system's share of SASRec, here and in the paper."""
    main_table, titles = (found.get(f"{name}-ml-100k", {}) for name in ("table6", "figure1a"))
    folders = {run["row"]: Path(run["folder"]) for run in main_table["runs"] if run["seed"] == 0 and not run["error"]}
    ndcg = {cell["row"]: cell for cell in main_table["cells"] if cell["metric"] == "NDCG@10"}
    lines = [
        "| system | NDCG@10 | HR@10 | shuffled | of SASRec | paper | titles HR@1 | steps | minutes |",
        "|---|---|---|---:|---:|---|---|---:|---:|",
    ]
    for row, cell in ndcg.items():
        hit = _cell(main_table, row, "HR@10")
        tests = test_results(folders[row])
        change = tests and tests[1].metrics["NDCG@10"].value / tests[0].metrics["NDCG@10"].value - 1
        title = _cell(titles, row, "HR@1", "Original")
        ratios = [_paper_ratio(row, name) for name in PAPER_DATASETS]
        known = [ratio for ratio in ratios if ratio is not None]
        progress = RunFolder(folders[row]).best().progress
        lines.append(
            f"| {row} | {_estimate(cell)} | {_estimate(hit)} | "
            f"{'-' if change is None else _percent(change)} | {cell['value'] / ndcg['SASRec']['value']:.2f} | "
            f"{f'{min(known):.2f} to {max(known):.2f}' if known else '-'} | {_estimate(title)} | {progress.step} | "
            f"{progress.useful_seconds / 60:.1f} |"
        )
    return lines


def _runs(found: dict[str, Json]) -> list[str]:
    runs = [run for each in found.values() for run in each["runs"] if not run["error"]]
    folders = dict.fromkeys((run["folder"], run["seed"]) for run in runs)
    lines = ["| run | seed | steps | best step | minutes |", "|---|---:|---:|---:|---:|"]
    for folder, seed in folders:
        run = RunFolder(Path(folder))
        newest = run.newest()
        if newest:
            minutes = newest.progress.useful_seconds / 60
            best = run.best().progress.step
            lines.append(f"| {Path(folder).name} | {seed} | {newest.progress.step} | {best} | {minutes:.1f} |")
    return lines


def _cell(results: Json, row: str, metric: str, history: str = "") -> Json | None:
    cells = results.get("cells", [])
    return next((c for c in cells if (c["row"], c["metric"], c["history"]) == (row, metric, history)), None)


def _estimate(cell: Json | None) -> str:
    return "-" if cell is None else f"{cell['value']:.4f} ±{(cell['high'] - cell['low']) / 2:.4f}"


def _percent(share: float) -> str:
    return f"{100 * share:+.1f} %".replace("-", "−")


def _paper_ratio(row: str, dataset: str) -> float | None:
    rows = paper_values("Table 6", dataset).rows
    own, reference = (rows.get(name, {}).get("NDCG@10") for name in (row, "SASRec"))
    return None if own is None or reference is None else own / reference


if __name__ == "__main__":
    main()
