"""Run an experiment: what it needs, what is done and left of it, and its trainings one after another."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import get_args

from trainer.config import LLM4RecConfig, RunConfig, UnseenItems, built_on
from trainer.config.text_systems import EncoderConfig
from trainer.planner.devices import DeviceKind
from trainer.runs.atomic import write_atomically
from trainer.runs.model_folder import check_encoder_path, check_llm_path
from trainer.runs.other_dataset import check_other
from trainer.runs.preflight import preflight
from trainer.workflows.comparing.comparison import ComparedRun, finished
from trainer.workflows.comparing.running import run_comparison
from trainer.workflows.comparing.table import Outcome
from trainer.workflows.experiments.measuring import check_metrics, found_metrics, measure
from trainer.workflows.experiments.planning import ExperimentPlan, places_of, resolved

_SECONDS = "seconds.json"
"""File in the folder of all runs: the seconds that each of them took, by folder."""


def check_experiment(plan: ExperimentPlan, ranks: int) -> None:
    """Refuse an experiment that cannot be carried out, before its first run.

    Raises:
        ValueError: a run cannot start, or the data cannot carry what is to be measured; the message names the cure.
    """
    experiment, manifest = plan.experiment, plan.budget.manifest
    check_metrics(experiment)
    if bool(experiment.elsewhere) != bool(plan.budget.others):
        raise ValueError(
            "give the datasets to test on: --other DIR ..."
            if experiment.elsewhere
            else "--other is of table7 alone, which tests on other datasets: leave it out"
        )
    if experiment.elsewhere and resolved(experiment.elsewhere, plan.budget.options) not in get_args(UnseenItems):
        raise ValueError(f"elsewhere: {experiment.elsewhere} is none of {', '.join(get_args(UnseenItems))}")
    for other in plan.budget.others.values():
        check_other(other, manifest)
    if (sources := resolved(experiment.sources, plan.budget.options)) not in ("original", "same"):
        raise ValueError(f"sources: {sources} is not a way to train what systems build on: write original or same")
    if manifest.statistics.users_with_test < 2:
        raise ValueError(
            f"{plan.budget.data} has {manifest.statistics.users_with_test} user(s) with a test item, too few to "
            "compare systems: build it with more reviews, or a lower --min-train"
        )
    reads_titles = [run.name for run in plan.runs if isinstance(run.config.system, LLM4RecConfig)]
    if reads_titles and manifest.statistics.missing_titles == manifest.num_items:
        raise ValueError(
            f"{plan.budget.data} has no titles, which {reads_titles[0]} reads: build it with --meta, or choose "
            "--systems that know items by id"
        )
    unfinished = {run.config.output for run in plan.runs if not finished(run.config)}
    for run in plan.runs:
        try:
            _check_run(run.config, ranks, unfinished)
        except ValueError as error:
            raise ValueError(f"{run.label}: {error}") from None


def _check_run(config: RunConfig, ranks: int, unfinished: set[Path]) -> None:
    """The preflight of a run; of one that builds on runs yet to be trained or resumed, what can be told before.

    Raises:
        ValueError: it cannot start.
    """
    if unfinished.isdisjoint(built_on(config.system).values()):
        preflight(config, ranks)
        return
    if ranks > config.train.batch_size:
        raise ValueError(f"{ranks} ranks cannot share a batch of {config.train.batch_size} users: lower --ranks")
    if isinstance(config.system, LLM4RecConfig):
        check_llm_path(config.system.llm.path)
    if isinstance(encoder := getattr(config.system, "encoder", None), EncoderConfig):
        check_encoder_path(encoder.path)


def levels_of(runs: Sequence[ComparedRun]) -> list[list[ComparedRun]]:
    """The unfinished runs: first those that build on finished runs alone, then those that build on these, and so on."""
    level: dict[Path, int] = {}
    levels: list[list[ComparedRun]] = []
    for run in runs:
        if finished(run.config):
            continue
        sources = [level[path] for path in built_on(run.config.system).values() if path in level]
        level[run.config.output] = depth = max(sources, default=-1) + 1
        levels += [[]] if depth == len(levels) else []
        levels[depth].append(run)
    return levels


@dataclass(frozen=True)
class State:
    """What is done of an experiment, and what is left."""

    done: int
    """Also those that failed."""
    left: int
    seconds: float | None
    """Expected seconds of what is left; None: nothing alike has been timed yet."""

    def __str__(self) -> str:
        eta = "" if self.seconds is None or not self.left else f", about {in_words(self.seconds)}"
        return f"{self.done} of {self.done + self.left} runs done, {self.left} left{eta}"


def is_done(plan: ExperimentPlan, run: ComparedRun) -> bool:
    """Whether a run is trained, and all that the experiment needs of it is measured."""
    if not finished(run.config):
        return False
    experiment = plan.experiment
    if not _is_measured(plan, run):
        return True
    wanted = product(experiment.histories.values(), places_of(plan).values())
    return all(found_metrics(run.config, experiment, history, where) is not None for history, where in wanted)


def state(plan: ExperimentPlan, done: Sequence[ComparedRun]) -> State:
    """What is left if these runs are done."""
    timed = _read_seconds(plan.budget.root)
    left = [run for run in plan.runs if run not in done]
    guesses = [_guess(run, timed) for run in left]
    # A system that was never timed is taken to last as long as the others.
    known = [guess for guess in guesses if guess is not None] or list(timed.values())
    seconds = sum(known) / len(known) * len(left) if known else None
    return State(len(plan.runs) - len(left), len(left), seconds)


def planned_seconds(run: ComparedRun, kind: DeviceKind, ranks: int) -> float | None:
    """What the planner expects a run to take on devices of this kind; None: it has no LLM, and takes little.

    Raises:
        ValueError: an LLM of unknown shape, or more devices than users in a batch.
    """
    if not isinstance(run.config.system, LLM4RecConfig):
        return None
    from trainer.planner.plan import plan_run  # reads the dataset and the tokenizer, with torch

    return plan_run(run.config, kind, ranks).forecast.run_seconds


def run_experiment(plan: ExperimentPlan, ranks: int, say: Callable[[str], None]) -> Iterator[Outcome]:
    """Train and measure what is missing; yields each run's outcome, in order. A failure does not stop other runs.

    Args:
        say: told what is done and left before each run.

    Raises:
        ValueError: a run was stopped by a signal; the same command resumes.
    """
    before = [run for run in plan.runs if is_done(plan, run)]
    done = list(before)
    outcomes = run_comparison(plan.runs, ranks)
    for number, run in enumerate(plan.runs, 1):
        say(f"== {number}/{len(plan.runs)} {run.name}: {run.config.output}; {state(plan, done)}")
        start = time.monotonic()
        outcome = next(outcomes)
        if not outcome.error and _is_measured(plan, run):
            where = list(places_of(plan).values())
            outcome = Outcome(run, outcome.results, measure(run.config, plan.experiment, where, ranks))
        if run not in before:
            done.append(run)
            if not outcome.error:
                _add_seconds(plan.budget.root, run.config.output.name, time.monotonic() - start)
        yield outcome


def in_words(seconds: float) -> str:
    """A duration for people: 45 s, 12 min, 3:05 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60}:{minutes % 60:02} h"


def _is_measured(plan: ExperimentPlan, run: ComparedRun) -> bool:
    """Whether the run is of a system that the experiment shows, not only built on."""
    return any(trained.run.config.output == run.config.output for trained in plan.trained)


def _guess(run: ComparedRun, timed: Mapping[str, float]) -> float | None:
    """Mean seconds of the timed runs of the same system."""
    name = run.config.output.name.rpartition("-")[0]
    alike = [seconds for folder, seconds in timed.items() if folder.rpartition("-")[0] == name]
    return sum(alike) / len(alike) if alike else None


def _read_seconds(root: Path) -> dict[str, float]:
    with suppress(OSError, ValueError):  # only a guess depends on it
        found = json.loads((root / _SECONDS).read_text())
        return {str(name): float(seconds) for name, seconds in found.items()}
    return {}


def _add_seconds(root: Path, folder: str, seconds: float) -> None:
    """Add to what a run took in earlier starts."""
    timed = _read_seconds(root)
    timed[folder] = timed.get(folder, 0.0) + seconds
    root.mkdir(parents=True, exist_ok=True)
    write_atomically(root / _SECONDS, json.dumps(timed, indent=1) + "\n")
