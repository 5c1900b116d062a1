"""Compare the results of runs: a table, the popularity baseline, and paired differences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from trainer.config import Candidates, ConfigError, Split
from trainer.evaluation.ranking import METRIC_NAMES, bootstrap_all
from trainer.reports.list_tables import beyond_accuracy
from trainer.reports.results import Result, collect, latest, utc_now
from trainer.reports.seeds import SeedRun, best_validation, group_seeds, seed_table
from trainer.reports.tables import METRICS, Style, comparison, differences
from trainer.reports.user_ranks import UserRanks, paired_difference, read_ranks
from trainer.runs.folder import RunFolder

POPULARITY = "popularity"
RECENT_POPULARITY = "popularity (7 days)"


def report(
    runs: Sequence[Path],
    split: Split = "test",
    candidates: Candidates = "sampled",
    *,
    metrics: Sequence[str] | None = None,
    popularity: bool = False,
    against: Path | None = None,
    style: Style = "text",
) -> str:
    """The table of the runs' newest results, in the order of `runs`, and means over seeds below it.

    Args:
        metrics: names of the metrics to show; None: the main ones of the task.
        popularity: begin with a row for ranking by the number of training events per item, and on a temporal split
            with one for those of the last seven days of training.
        against: one of the runs; below the table, its difference to each other row, paired over users, in the first
            metric shown.

    Raises:
        ValueError: a run has no results, or none that can be compared; the message has the cure.
    """
    if against is not None and against not in runs:
        raise ValueError(f"--against {against} is not among the runs to report: add it")
    names = [run.name for run in runs]
    if against is not None and len(set(names)) < len(names):
        raise ValueError("two runs have the same folder name: --against cannot tell them apart; rename one")
    results = collect(runs, split, candidates)
    first: list[Result] = []
    ranks: dict[str, UserRanks] = {}
    if popularity:
        for result, found_ranks in popularity_results(runs[0], results[0]):
            first.append(result)
            ranks[result.run] = found_ranks
    table = comparison([*first, *results], metrics, style) + beyond_accuracy([*first, *results], style)
    if over_seeds := _over_seeds(runs, results):
        table += f"\n{seed_table(over_seeds, style)}"
    if against is None:
        return table
    metric = metrics[0] if metrics else METRICS[results[0].task][0]
    if metric not in METRIC_NAMES:
        raise ValueError(f"{metric} is not kept per user: put one of {', '.join(METRIC_NAMES)} first in --metrics")
    tie = results[0].tie
    for run in runs:
        ranks[run.name] = read_ranks(run, _newest(collect([run], split, candidates)))
    mine = ranks.pop(against.name)
    found = {name: paired_difference(mine, other, metric, tie) for name, other in ranks.items()}
    return f"{table}\n{differences(against.name, found, metric, style)}" if found else table


def _over_seeds(runs: Sequence[Path], results: Sequence[Result]) -> list[SeedRun]:
    """The runs with their results, if at least two of them differ in nothing but their seed."""
    newest = {(result.run, result.system, result.history): result for result in latest(results)}
    found = []
    for run in runs:
        try:
            config = RunFolder(run).config()
        except ConfigError:  # results alone, as of a run that was copied without the rest
            continue
        original, shuffled = (newest.get((run.name, config.system.name, order)) for order in ("original", "shuffled"))
        if original:
            found.append(SeedRun(config.system.name, config, best_validation(run), original, shuffled))
    return found if any(len(group) > 1 for group in group_seeds(found)) else []


def _newest(results: Sequence[Result]) -> Result:
    """The newest result on original histories."""
    original = [result for result in latest(results) if result.history == "original"]
    if not original:
        raise ValueError(f"{results[0].run} was evaluated on shuffled histories only: evaluate it on the original ones")
    return original[-1]


def popularity_results(run: Path, like: Result) -> list[tuple[Result, UserRanks]]:
    """The results of ranking by popularity, on the dataset of a run.

    Args:
        like: a result of the run, whose split, candidates and ties are used.

    Raises:
        ValueError: it is of title generation, or the dataset is not the one that the run was evaluated on.
    """
    from trainer.data.reading.dataset import open_dataset  # late: a report alone reads no dataset
    from trainer.evaluation.popularity import RECENT_DAYS, popularity_ranks

    if like.task != "retrieval":
        raise ValueError("--popularity ranks items, not titles: leave it out for title generation")
    config = RunFolder(run).config()
    dataset = open_dataset(config.data.path, full_check=False)
    if dataset.manifest.fingerprint != like.dataset_fingerprint:
        raise ConfigError(f"{config.data.path} is not the dataset that {run} was evaluated on: restore it")
    kinds: dict[str, int | None] = {POPULARITY: None}
    if dataset.manifest.is_temporal:
        kinds[RECENT_POPULARITY] = RECENT_DAYS
    rows = []
    for name, days in kinds.items():
        user_T, ranks = popularity_ranks(dataset, like.split, like.candidates, days)
        found = UserRanks(user_T, ranks)
        counts = set(ranks.candidates.tolist())
        result = replace(
            like,
            run=name,
            system=name,
            config_hash="",
            history="original",
            num_candidates=counts.pop() if len(counts) == 1 else None,
            extensions=(),
            step=0,
            users=len(found.user_U),
            metrics=bootstrap_all(found.metrics(like.tie), seed=config.evaluation.seed),
            totals={},
            seconds=0.0,
            tokens=0,
            created=utc_now(),
        )
        rows.append((result, found))
    return rows
