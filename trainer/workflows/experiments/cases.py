"""Users by which systems are right about them, with examples: the paper's Figure 6, by rule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from trainer.distributed import start, stop
from trainer.evaluation.ranking import bootstrap
from trainer.reports.page.cases import Pattern, patterns, sampled
from trainer.reports.page.content import Case, Cases, Table
from trainer.reports.page.run_record import RunRecord, read_run
from trainer.workflows.experiments.planning import ExperimentPlan, resolved
from trainer.workflows.pages.cases import answered

_NOTE = "A fixed random sample of the users of each pattern. Their numbers are indices of the dataset, not raw ids."


@dataclass(frozen=True)
class RightAndWrong:
    """All patterns with their numbers of users, and examples of each."""

    top: int
    counts: Table
    examples: Cases | None
    """None: no run can answer."""

    def markdown(self) -> str:
        """Examples for people to read."""
        if self.examples is None:
            return "# Examples\n\nNo run can answer.\n"
        cases = map(_case_markdown, self.examples.cases)
        return "\n\n".join(["# Examples", self.examples.note, *cases]) + "\n"


def right_and_wrong(plan: ExperimentPlan, failed: Mapping[str, str]) -> RightAndWrong | None:
    """Count the patterns of the first seed's runs, and let these runs answer for some users of each pattern.

    Returns:
        None if fewer than two runs have their users' ranks.
    """
    experiment, options = plan.experiment, plan.budget.options
    if experiment.cases is None:
        return None
    top, number = (int(resolved(value, options)) for value in (experiment.cases.top, experiment.cases.examples))
    runs = {
        trained.row: read_run(
            trained.run.config.output, trained.row, "test", trained.run.config.evaluation.candidates, experiment.task
        )
        for trained in plan.trained
        if trained.seed == 0 and trained.run.label not in failed
    }
    ranks = {label: run.ranks for label, run in runs.items() if run.ranks is not None}
    if len(ranks) < 2:
        return None
    found = patterns(ranks, top)
    return RightAndWrong(top, _counts(found, top), _examples(list(runs.values()), found, number))


def _examples(runs: list[RunRecord], found: list[Pattern], number: int) -> Cases | None:
    chosen = [each for pattern in found for each in sampled(pattern.user_U, number, pattern.label)]
    world = start(runs[0].config.engine.threads)
    try:
        shown = answered(runs, chosen, "test", runs[0].config.evaluation.candidates, world)
    finally:
        stop()
    return shown and replace(shown, note=_NOTE)


def _counts(found: list[Pattern], top: int) -> Table:
    users = sum(len(pattern.user_U) for pattern in found)
    rows = []
    for pattern in found:
        is_U = np.zeros(users)
        is_U[: len(pattern.user_U)] = 1
        rows.append((pattern.label, len(pattern.user_U), bootstrap(is_U, seed=0)))
    note = f"Right: the target is ranked among the first {top}; ties count against a system."
    return Table.of(("pattern", "users", "share of users"), rows, note=note)


def _case_markdown(case: Case) -> str:
    earlier = [f"1. ({case.earlier:,} earlier)"] if case.earlier else []
    history = [f"1. {day}: {title}" for day, title in case.history]
    answers = [
        f"* {answer.system} ranks it {answer.rank} of {answer.candidates}. First: "
        + "; ".join(f"**{title}**" if is_target else title for title, is_target in answer.top)
        for answer in case.answers
    ]
    head = f"## User {case.user}: {case.why}"
    return "\n".join([head, "", *earlier, *history, "", f"Next: **{case.target}**", "", *answers])
