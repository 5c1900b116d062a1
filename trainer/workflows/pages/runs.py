"""The page of one run, or of several side by side."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from trainer.config import Candidates, Split
from trainer.distributed import World
from trainer.reports.page.content import Page, Section, Text, Tile, signed
from trainer.reports.page.provenance import provenance, reproduce
from trainer.reports.page.quality import Row, main_metrics, paired, quality
from trainer.reports.page.run_record import RunRecord, labels, read_run
from trainer.reports.page.training import curves, ranks, throughput, what_was_run
from trainer.runs.commit import git_commit
from trainer.workflows.pages.cases import cases
from trainer.workflows.report import popularity_results

log = logging.getLogger(__name__)


def runs_page(
    paths: Sequence[Path],
    split: Split = "test",
    candidates: Candidates = "sampled",
    *,
    title: str | None = None,
    command: str,
    popularity: bool = False,
    number_of_cases: int = 3,
    world: World | None = None,
) -> Page:
    """The page of these runs; the first is compared with each other one.

    Args:
        title: None: the names of the first run and its system, or of all runs.
        command: the command that writes the page, shown with those that train the runs.
        popularity: add a row for ranking by the number of training events per item.
        number_of_cases: users per rule whose answers are shown.
        world: the process group in which runs are loaded to answer; None: without cases.

    Raises:
        ValueError: not run folders, or damaged results.
    """
    unique = list(dict.fromkeys(paths))
    runs = [read_run(path, label, split, candidates) for path, label in zip(unique, labels(unique), strict=True)]
    rows = [Row(run.label, style, run.original, run.shuffled, run.ranks) for style, run in enumerate(runs)]
    if popularity:
        rows += _popularity(runs)
    tested = [row for row in rows if row.result]
    metric = main_metrics(tested)[0] if tested else ""
    compared, verdict = paired(rows[0], rows[1:], metric) if tested else (None, "")
    shown = cases(runs, number_of_cases, split, candidates, world) if world else None
    sections = [
        what_was_run(runs),
        quality(rows) or Section("Quality", (_untested(runs, split, candidates),)),
        compared,
        Section("Cases", (shown,)) if shown else None,
        curves(runs),
        throughput(runs),
        provenance(runs),
        reproduce(runs, command),
    ]
    return Page(
        title=title or _title(runs),
        subtitle=_subtitle(runs, split, candidates),
        sections=tuple(section for section in sections if section is not None),
        tiles=tuple(_tiles(runs[0], metric)),
        verdict=verdict,
        footer=f"llm-srec-trainer {version('llm-srec-trainer')}, commit {git_commit()}",
    )


def _popularity(runs: Sequence[RunRecord]) -> list[Row]:
    run = next((run for run in runs if run.original), None)
    if run is None or run.original is None:
        return []
    try:
        found = popularity_results(run.path, run.original)
    except (ValueError, OSError) as error:
        log.warning("popularity is left out: %s", error)
        return []
    return [Row(result.run, len(runs) + place, result, None, ranks) for place, (result, ranks) in enumerate(found)]


def _title(runs: Sequence[RunRecord]) -> str:
    if len(runs) == 1:
        return f"{runs[0].label}: {runs[0].config.system.name}"
    others = ", ".join(run.label for run in runs[1:3]) + (" and others" if len(runs) > 3 else "")
    return f"{runs[0].label} against {others}"


def _subtitle(runs: Sequence[RunRecord], split: Split, candidates: Candidates) -> str:
    result = next((run.result for run in runs if run.result), None)
    if result is None:
        return f"{runs[0].config.data.path.name} · not evaluated yet"
    number = "" if result.num_candidates is None else f"{result.num_candidates:,} "
    kind = "stored candidates" if candidates == "sampled" else "items of the full catalog"
    return f"{result.dataset} · {split} split · {result.users:,} users · {number}{kind} · {result.task}"


def _tiles(run: RunRecord, metric: str) -> list[Tile]:
    """Headline numbers of the first run."""
    tiles = []
    if run.original and metric in run.original.metrics:
        estimate = run.original.metrics[metric]
        tiles.append(Tile(metric, f"{estimate.value:.4f}", f"{estimate.low:.4f} to {estimate.high:.4f}"))
        if run.shuffled and metric in run.shuffled.metrics and estimate.value > 0:
            change = 100 * (run.shuffled.metrics[metric].value / estimate.value - 1)
            tiles.append(Tile("without the order", signed(change, ".1f") + " %", f"{metric} with shuffled histories"))
    if run.newest:
        minutes = run.newest.progress.useful_seconds / 60
        time = f"{minutes / 60:.1f} h" if minutes >= 90 else f"{minutes:.1f} min"
        progress = run.newest.progress
        tiles.append(Tile("training", time, f"{progress.step:,} steps on {ranks(progress.world_size)}"))
    if run.best:
        chosen = run.config.train.metric
        tiles.append(Tile("best step", f"{run.best.progress.step:,}", f"by {chosen} on the validation split"))
    return tiles


def _untested(runs: Sequence[RunRecord], split: Split, candidates: Candidates) -> Text:
    full = " --candidates full" * (candidates == "full")
    return Text(f"No results yet: add them with `llm-srec evaluate {runs[0].path} --split {split}{full}`.")
