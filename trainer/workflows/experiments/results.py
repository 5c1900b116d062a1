"""From runs to the numbers of an experiment: means over users and seeds, changes, and paired tests.

Letters: U users.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np

from trainer.data.reading.counter_rng import IntArray
from trainer.evaluation.ranking import Estimate, Floats, bootstrap
from trainer.evaluation.significance import holm, mean_over_seeds, relative_change, sign_flip_p
from trainer.workflows.experiments.measuring import UserMetrics, found_metrics
from trainer.workflows.experiments.planning import ExperimentPlan, Trained, places_of

STATISTICS_ROW = "stats"
"""The row of `measure: statistics`."""


class Place(NamedTuple):
    """Where a number stands: a row, and labels of the columns ("" where there is only one)."""

    row: str
    training: str
    history: str
    group: str
    metric: str


@dataclass(frozen=True)
class Cell:
    """One number of the table."""

    place: Place
    users: int
    of_seeds: Mapping[int, float]
    """Mean over users of each seed's run."""
    estimate: Estimate
    """Mean over users and seeds, and its 95 % bootstrap interval over users."""
    value_U: Floats
    """Each user's mean over seeds."""

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds; None for a single one."""
        return float(np.std(list(self.of_seeds.values()), ddof=1)) if len(self.of_seeds) > 1 else None


@dataclass(frozen=True)
class Change:
    """The second of two columns against the first, as a share of it."""

    place: Place
    """With the label of the second column."""
    estimate: Estimate


@dataclass(frozen=True)
class PairedTest:
    """The reference's mean minus that of another row, over the same users."""

    place: Place
    """That of the other row."""
    difference: Estimate
    p: float
    """Two-sided p-value of a permutation test over users."""
    adjusted: float
    """The p-value after Holm's correction over the other rows of the column."""


@dataclass(frozen=True)
class Numbers:
    """All numbers of an experiment."""

    cells: tuple[Cell, ...]
    changes: tuple[Change, ...]
    tests: tuple[PairedTest, ...]


def collect(plan: ExperimentPlan, failed: Mapping[str, str], groups: Mapping[str, IntArray]) -> Numbers:
    """The numbers of all runs that did not fail.

    Args:
        failed: error by label of the run.
        groups: user indices by label of the group; empty: all users.

    Raises:
        ValueError: runs of one row have different users.
    """
    if plan.experiment.measure == "statistics":
        return Numbers(tuple(_statistics(plan)), (), ())
    done = [trained for trained in plan.trained if trained.run.label not in failed]
    places = dict.fromkeys((trained.row, trained.training) for trained in done)
    cells = [
        cell
        for row, training in places
        for cell in _cells(plan, [t for t in done if (t.row, t.training) == (row, training)], groups)
    ]
    by_place = {cell.place: cell for cell in cells}
    return Numbers(tuple(cells), tuple(_changes(plan, by_place)), tuple(_tests(plan, by_place)))


def _statistics(plan: ExperimentPlan) -> list[Cell]:
    found = plan.budget.manifest.statistics
    cells = []
    for metric in plan.experiment.metrics:
        value = float(getattr(found, metric))
        estimate = Estimate(value, value, value)
        cells.append(Cell(Place(STATISTICS_ROW, "", "", "", metric), found.users, {}, estimate, np.array([value])))
    return cells


def _cells(plan: ExperimentPlan, seeds: Sequence[Trained], groups: Mapping[str, IntArray]) -> list[Cell]:
    """All cells of one row and training column."""
    experiment, first = plan.experiment, seeds[0]
    cells = []
    for label, history in experiment.histories.items():
        for name, elsewhere in places_of(plan).items():
            of_seeds = {each.seed: found_metrics(each.run.config, experiment, history, elsewhere) for each in seeds}
            measured = {seed: found for seed, found in of_seeds.items() if found is not None}
            parts = groups.items() or [(name, None)]
            cells += _of_history(first, label, measured, parts, experiment.metrics) if measured else []
    return cells


def _of_history(
    first: Trained,
    label: str,
    measured: Mapping[int, UserMetrics],
    groups: Iterable[tuple[str, IntArray | None]],
    metrics: Sequence[str],
) -> list[Cell]:
    """The cells of one history, by group and metric, from what was measured by seed."""
    cells = []
    for (group, chosen), metric in product(groups, metrics):
        values = {seed: _of_group(found, metric, chosen) for seed, found in measured.items()}
        value_U = mean_over_seeds(list(values.values()))
        place = Place(first.row, first.training, label, group, metric)
        means = {seed: float(of_seed_U.mean()) for seed, of_seed_U in values.items()}
        cells.append(Cell(place, len(value_U), means, bootstrap(value_U, seed=0), value_U))
    return cells


def _of_group(found: UserMetrics, metric: str, chosen: IntArray | None) -> Floats:
    value_U = found.value[metric]
    return value_U if chosen is None else value_U[np.isin(found.user_U, chosen)]


def _changes(plan: ExperimentPlan, cells: Mapping[Place, Cell]) -> list[Change]:
    experiment = plan.experiment
    if experiment.change == "none":
        return []
    labels = list(experiment.training if experiment.change == "training" else experiment.histories)
    move: Callable[[Place, str], Place] = (
        (lambda place, label: place._replace(training=label))
        if experiment.change == "training"
        else (lambda place, label: place._replace(history=label))
    )
    changes = []
    for place, cell in cells.items():
        if place != move(place, labels[0]):
            continue
        after = cells.get(move(place, labels[1]))
        if after is not None and cell.value_U.mean() > 0:
            changes.append(Change(after.place, relative_change(cell.value_U, after.value_U)))
    return changes


def _tests(plan: ExperimentPlan, cells: Mapping[Place, Cell]) -> list[PairedTest]:
    """Tests of each column against the reference row, if it has one."""
    if plan.experiment.measure == "minutes":
        return []  # there are no users to pair
    rows = [trained.row for trained in plan.trained]
    names = {trained.row for trained in plan.trained if plan.experiment.reference in (trained.row, trained.system)}
    if not names:
        return []
    reference = next(row for row in reversed(rows) if row in names)
    tests = []
    for column in dict.fromkeys(place._replace(row="") for place in cells):
        first = cells.get(column._replace(row=reference))
        others = {
            row: cells[place]
            for row in dict.fromkeys(rows)
            if row != reference and (place := column._replace(row=row)) in cells
        }
        if first is None or not others:
            continue
        p_values = {row: sign_flip_p(first.value_U, other.value_U) for row, other in others.items()}
        adjusted = holm(p_values)
        tests += [
            PairedTest(other.place, bootstrap(first.value_U - other.value_U, seed=0), p_values[row], adjusted[row])
            for row, other in others.items()
        ]
    return tests
