"""An experiment from its name to its results: plan, check, run, report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shards.manifest import check_sizes, read_manifest
from trainer.config import ConfigError
from trainer.data.reading.counter_rng import IntArray
from trainer.planner.devices import DeviceKind
from trainer.reports.page.render import render
from trainer.runs.atomic import write_atomically
from trainer.workflows.comparing.running import forecast
from trainer.workflows.experiments.page import experiment_page
from trainer.workflows.experiments.pictures import draw
from trainer.workflows.experiments.planning import Budget, ExperimentPlan, plan_experiment
from trainer.workflows.experiments.report import Report
from trainer.workflows.experiments.results import collect
from trainer.workflows.experiments.running import (
    check_experiment,
    in_words,
    is_done,
    planned_seconds,
    run_experiment,
    state,
)
from trainer.workflows.experiments.spec import Experiment, chosen_options, load_experiment, load_recipe

if TYPE_CHECKING:
    from trainer.workflows.experiments.cases import RightAndWrong


@dataclass(frozen=True)
class Asked:
    """What the user asks for."""

    name: Path
    """An experiment's name, or a file."""
    data: Path
    recipe: Path = Path("paper")
    systems: tuple[str, ...] = ()
    """Those to keep; none: all."""
    seeds: int = 1
    one_source: bool = False
    options: tuple[str, ...] = ()
    """`NAME=VALUE`."""
    overrides: tuple[str, ...] = ()
    """`section.key=value`, possibly of one system (`NAME:`)."""
    others: tuple[Path, ...] = ()
    """Datasets to test on, of an experiment that tests on others."""
    root: Path = Path("runs/experiments")


def prepare(asked: Asked, ranks: int = 1) -> ExperimentPlan:
    """Plan and check an experiment; starts nothing and writes nothing.

    Raises:
        ValueError: it cannot be run; the message names the thing and the cure.
    """
    if asked.seeds < 1 or ranks < 1:
        raise ConfigError(f"--seeds {asked.seeds} --ranks {ranks}: give the number of seeds, and of processes per run")
    experiment, recipe = load_experiment(asked.name), load_recipe(asked.recipe)
    manifest = read_manifest(asked.data)
    check_sizes(asked.data, manifest)
    budget = Budget(
        recipe,
        asked.data,
        manifest,
        asked.root,
        chosen_options(experiment, recipe, asked.options),
        asked.overrides,
        asked.seeds,
        {read_manifest(other).name: other for other in asked.others},
        asked.one_source,
    )
    plan = plan_experiment(experiment, budget, asked.systems)
    check_experiment(plan, ranks)
    _groups(experiment, asked.data)
    return plan


def describe(plan: ExperimentPlan, ranks: int = 1) -> str:
    """Every run with its state, the experiment's options, and what the rest costs as far as that is known."""
    lines = [plan.experiment.title, *(forecast(plan.runs, ranks) if plan.runs else [])]
    for name, option in plan.experiment.options.items():
        choices = f" (one of: {', '.join(map(str, option.choices))})" if option.choices else ""
        lines.append(f"option {name}={plan.budget.options[name]}: {option.about}{choices}")
    lines.append(str(state(plan, [run for run in plan.runs if is_done(plan, run)])))
    return "\n".join(lines)


def costs(plan: ExperimentPlan, kind: DeviceKind, ranks: int = 1) -> str:
    """What the planner expects each unfinished run of an LLM recommender to take on devices of a kind, and all of them.

    Raises:
        ValueError: an LLM of unknown shape, or more devices than users in a batch.
    """
    left = [run for run in plan.runs if not is_done(plan, run)]
    seconds = {run.label: planned_seconds(run, kind, ranks) for run in left}
    known = {label: value for label, value in seconds.items() if value is not None}
    lines = [f"{label}: {in_words(value)}" for label, value in known.items()]
    total = f"{len(known)} runs with a language model on {ranks} {kind}: {in_words(sum(known.values()))}"
    return "\n".join([*lines, f"{total}; {len(left) - len(known)} without one are not counted"])


def run(
    name: str, plan: ExperimentPlan, folder: Path, ranks: int, say: Callable[[str], None], command: str
) -> tuple[Report, list[Path]]:
    """Run what is missing and write the results.

    Args:
        command: the command that does so, for the page.

    Returns:
        The results, and the files that hold them.
    """
    failed: dict[str, str] = {}
    groups = _groups(plan.experiment, plan.budget.data)
    for outcome in run_experiment(plan, ranks, say):
        if outcome.error:
            failed[outcome.run.label] = outcome.error
            say(f"{outcome.run.label} failed: {outcome.error}")
    report = Report(name, plan, collect(plan, failed, groups), failed, _cases(plan, failed))
    files = report.write(folder)
    page = folder / "page.html"
    write_atomically(page, render(experiment_page(report, command)))
    return report, [*files, *draw(report, folder), page]


def _cases(plan: ExperimentPlan, failed: Mapping[str, str]) -> RightAndWrong | None:
    if plan.experiment.cases is None:
        return None
    from trainer.workflows.experiments.cases import right_and_wrong  # imports torch, which a plan does without

    return right_and_wrong(plan, failed)


def _groups(experiment: Experiment, data: Path) -> Mapping[str, IntArray]:
    """User indices by label of the group; empty: the experiment has none.

    Raises:
        ValueError: the data has too few users for them.
    """
    if experiment.groups == "none":
        return {}
    # Late: a plan reads no users.
    from trainer.data.reading.dataset import open_dataset
    from trainer.evaluation.order.user_groups import popularity_groups, transition_groups

    dataset = open_dataset(data, full_check=False)
    return (transition_groups if experiment.groups == "transition" else popularity_groups)(dataset, "test")
