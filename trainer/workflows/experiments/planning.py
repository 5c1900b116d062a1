"""From an experiment and a recipe to the runs that it needs, each in a folder named by what decides its result."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shards.manifest import Manifest
from trainer.config import (
    ConfigError,
    RunConfig,
    Task,
    UnseenItems,
    applicable_overrides,
    built_on,
    config_hash,
    load_config,
    with_absolute_paths,
)
from trainer.workflows.comparing.comparison import ComparedRun
from trainer.workflows.experiments.spec import NAMES, Experiment, Recipe, Settings


@dataclass(frozen=True)
class Budget:
    """Dataset, recipe, options and seeds that an experiment is planned for."""

    recipe: Recipe
    data: Path
    manifest: Manifest
    """That of `data`."""
    root: Path
    """Folder of all experiments' runs."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Values of the experiment's options."""
    overrides: tuple[str, ...] = ()
    """`section.key=value` for all runs that have the key, `NAME,...:section.key=value` for those of these systems."""
    seeds: int = 1
    others: Mapping[str, Path] = field(default_factory=dict)
    """Other datasets to test on, by name."""
    one_source: bool = False
    """Whether the runs that systems build on are trained with the first seed alone."""


@dataclass(frozen=True)
class Trained:
    """A system that is trained for the experiment: one row and training column, with one seed."""

    system: str
    row: str
    """Label of the row."""
    training: str
    """Label of the column."""
    seed: int
    run: ComparedRun


@dataclass(frozen=True)
class ExperimentPlan:
    """All trainings of an experiment."""

    experiment: Experiment
    budget: Budget
    trained: tuple[Trained, ...]
    runs: tuple[ComparedRun, ...]
    """Every run once, with those that others build on, each after the runs that it builds on."""


@dataclass(frozen=True)
class Elsewhere:
    """Another dataset to test on."""

    data: Path
    unseen: UnseenItems


def plan_experiment(experiment: Experiment, budget: Budget, systems: Sequence[str] = ()) -> ExperimentPlan:
    """The runs of an experiment, those of the first seed first, so that a first table is there early.

    Args:
        systems: names of the systems to keep; none: all.

    Raises:
        ConfigError: a setting is wrong or used by no system, or a system is not in the experiment or the recipe.
    """
    if unknown := [name for name in systems if name not in experiment.systems]:
        raise ConfigError(f"--systems {unknown[0]}: this experiment has {', '.join(experiment.systems)}")
    runs = _Runs(experiment, budget)
    kept = [name for name in experiment.systems if not systems or name in systems]
    trained = [
        Trained(name, row_label(experiment, name, row), column, seed, runs.add(name, row, column, seed))
        for seed in range(budget.seeds)
        for name in kept
        for row in experiment.rows
        for column in experiment.training
    ]
    runs.check_used()
    _check_different(trained)
    return ExperimentPlan(experiment, budget, tuple(trained), tuple(runs.planned.values()))


def _check_different(trained: Sequence[Trained]) -> None:
    """Refuse two trainings that are the same run, because an override replaces what tells them apart.

    Raises:
        ConfigError: there are two.
    """
    first: dict[Path, Trained] = {}
    for each in trained:
        other = first.setdefault(each.run.config.output, each)
        if other is not each:
            names = [" ".join(part for part in (one.row, one.training) if part) for one in (other, each)]
            raise ConfigError(
                f"{names[0]} and {names[1]} are trained alike: leave out the --set or --option that makes them equal"
            )


def places_of(plan: ExperimentPlan) -> Mapping[str, Elsewhere | None]:
    """Where the runs are tested, by label: on their own dataset, or on others."""
    experiment = plan.experiment
    if not experiment.elsewhere:
        return {"": None}
    unseen = resolved(experiment.elsewhere, plan.budget.options)
    return {name: Elsewhere(data, unseen) for name, data in plan.budget.others.items()}


def row_label(experiment: Experiment, system: str, row: str) -> str:
    """The label of a system's row: its name, that of the variant, or both where there are several of each."""
    name = NAMES.get(system, system)
    if not row:
        return name
    return row if len(experiment.systems) == 1 else f"{name}, {row}"


class _Runs:
    """Runs by folder, in the order in which they can be trained."""

    def __init__(self, experiment: Experiment, budget: Budget) -> None:
        self._experiment = experiment
        self._budget = budget
        self._used: set[str] = set()
        self.planned: dict[Path, ComparedRun] = {}

    def add(self, name: str, row: str, column: str, seed: int) -> ComparedRun:
        """Add a system's run after those that it builds on; the run that is there already, if it is the same."""
        experiment = self._experiment
        varied = [experiment.rows[row], experiment.training[column]]
        sources = resolved(experiment.sources, self._budget.options)
        label = " ".join(part for part in (name, _short(row), _short(column), f"seed {seed}") if part)
        of_sources = [experiment.training[column]] if sources == "same" else []
        return self._add(name, varied, of_sources, seed, experiment.task, label)

    def check_used(self) -> None:
        """Reject an override that changes no run: a mistyped key or name."""
        for word in self._budget.overrides:
            if word not in self._used:
                raise ConfigError(f"--set {word}: no system of this experiment has the key; write section.key=value")

    def _add(
        self, name: str, varied: list[Settings], of_sources: list[Settings], seed: int, task: Task, label: str
    ) -> ComparedRun:
        budget = self._budget
        entry = budget.recipe.entry(name, task)
        preset = Path(entry.preset)
        source_seed = 0 if budget.one_source else seed
        sources = {
            key: self._add(source, of_sources, of_sources, source_seed, "retrieval", f"{source} seed {source_seed}")
            for key, source in entry.builds_on.items()
        }
        words = [f"data.path={json.dumps(str(budget.data))}", f"seed={seed}"]
        words += [f"{key}={json.dumps(value)}" for key, value in budget.recipe.settings(name, task).items()]
        words += [f"system.{key}={json.dumps(str(run.config.output))}" for key, run in sources.items()]
        for settings in varied:
            words += _settings_words(name, preset, settings, budget.options)
        words += self._given(name, preset)
        config = load_config(preset, words)
        _check_sources(name, config, set(entry.builds_on))
        output = budget.root / f"{name}-{_identity(config, budget.manifest, sources)}"
        words.append(f"output={json.dumps(str(output))}")
        run = ComparedRun(preset, tuple(words), load_config(preset, words), label)
        return self.planned.setdefault(output, run)

    def _given(self, name: str, preset: Path) -> list[str]:
        """The `--set` words that apply to a system."""
        found = []
        for word in self._budget.overrides:
            key, _, value = word.partition("=")
            if words := _words(name, preset, key, value):
                self._used.add(word)
                found += words
        return found


def resolved(value: Any, options: Mapping[str, Any]) -> Any:
    """The value, or that of the option that it names.

    Raises:
        ConfigError: there is no such option.
    """
    if not (isinstance(value, str) and value.startswith("$")):
        return value
    if value[1:] not in options:
        raise ConfigError(f"the experiment uses the option {value}, which it does not have")
    return options[value[1:]]


def _settings_words(name: str, preset: Path, settings: Settings, options: Mapping[str, Any]) -> list[str]:
    return [
        word
        for key, value in settings.items()
        for word in _words(name, preset, key, json.dumps(resolved(value, options)))
    ]


def _words(name: str, preset: Path, key: str, value: str) -> list[str]:
    """A setting as override of a system: none if it is for other systems."""
    names, scoped, own = key.partition(":")
    if scoped:
        return [f"{own}={value}"] if name in names.split(",") else []
    return applicable_overrides(preset, [f"{key}={value}"])


def _check_sources(name: str, config: RunConfig, given: set[str]) -> None:
    """Refuse a system that reads runs which the experiment does not train: they may be of other data.

    Raises:
        ConfigError: the recipe leaves one out.
    """
    if missing := sorted(set(built_on(config.system)) - given):
        raise ConfigError(
            f"the recipe gives {name} no {missing[0]}: add `builds_on: {{{missing[0]}: NAME}}` to it, with the name of "
            "another system of the recipe"
        )


def _identity(config: RunConfig, manifest: Manifest, sources: Mapping[str, ComparedRun]) -> str:
    """Hash of all that decides a run's result: settings and length of training, data, language model, sources."""
    system = with_absolute_paths(config).system
    facts = {
        "config": config_hash(config),
        "data": manifest.fingerprint,
        "length": [config.train.epochs, config.train.max_steps, config.train.patience],
        "models": [getattr(getattr(system, key, None), "path", None) for key in ("llm", "encoder")],
        "sources": {key: run.config.output.name for key, run in sources.items()},
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]


def _short(label: str) -> str:
    return label.split()[0] if label.startswith("(") else label
