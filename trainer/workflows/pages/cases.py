"""The cases of a page: chosen users, and what each run answers to them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from shards.manifest import read_manifest
from trainer.config import Candidates, Split
from trainer.data.reading.counter_rng import IntArray
from trainer.data.reading.dataset import Dataset, open_dataset
from trainer.distributed import World
from trainer.reports.page.cases import Chosen, choose
from trainer.reports.page.content import Answer, Case, Cases
from trainer.reports.page.run_record import RunRecord
from trainer.runs.preflight import check_saved_run
from trainer.runs.requirements import check_recommends
from trainer.workflows.answers import Question, Ranked, answer, days, questions
from trainer.workflows.load_run import load_run

SYSTEMS = 3
"""Runs whose answers are shown, the first ones."""
_TOP = 3
_HISTORY = 8
"""Latest events that are shown."""

log = logging.getLogger(__name__)


def cases(runs: Sequence[RunRecord], number: int, split: Split, candidates: Candidates, world: World) -> Cases | None:
    """Answers of the first three runs to `number` users per rule; None if no run can answer.

    A run that cannot be loaded, or that has no ranks of its users, is left out with a warning.
    """
    asked = [run for run in runs if run.ranks is not None and run.config.task == "retrieval"][:SYSTEMS]
    if not asked or number < 1:
        return None
    fingerprint = read_manifest(asked[0].config.data.path).fingerprint
    asked = [run for run in asked if run.original and run.original.dataset_fingerprint == fingerprint]
    chosen = choose({run.label: run.ranks for run in asked if run.ranks is not None}, number)
    shown = answered(asked, chosen, split, candidates, world)
    return shown and replace(shown, note=_note(list(dict.fromkeys(run.label for run in asked)), candidates))


def answered(
    runs: Sequence[RunRecord], chosen: Sequence[Chosen], split: Split, candidates: Candidates, world: World
) -> Cases | None:
    """Answers of the runs, which are of one dataset, to chosen users; None if no run can answer.

    A run that cannot be loaded is left out with a warning.
    """
    dataset = open_dataset(runs[0].config.data.path, full_check=False)
    question = questions(dataset, split, candidates, np.array([found.user for found in chosen]))
    answers = {run.label: found for run in runs if (found := _answers(run, question, world))}
    if not answers:
        return None
    return Cases(tuple(_case(dataset, question, answers, found) for found in chosen))


def _answers(run: RunRecord, question: Question, world: World) -> list[Ranked]:
    """One run's answers; empty if it cannot be loaded."""
    try:
        saved = check_saved_run(run.path)
        check_recommends(saved.config)
        loaded = load_run(saved, world)
        item_ND = loaded.item_vectors
    except (ValueError, OSError) as error:
        log.warning("%s: its answers are left out: %s", run.path, error)
        return []
    return answer(loaded.system.vectors, item_ND, question, world.device, top=_TOP)


def _case(dataset: Dataset, question: Question, answers: dict[str, list[Ranked]], chosen: Chosen) -> Case:
    row = int(np.flatnonzero(question.histories.user_U == chosen.user)[0])
    history = question.histories.take(np.array([row]))
    shown = history.last(_HISTORY)
    target = int(question.target_B[row])
    first = min(found[row].rank for found in answers.values())
    return Case(
        user=f"{chosen.user:,}",
        why=chosen.why,
        history=tuple(zip(days(shown), _titles(dataset, shown.item_E), strict=True)),
        earlier=len(history.item_E) - len(shown.item_E),
        target=dataset.titles[target - 1],
        answers=tuple(
            Answer(
                system=label,
                rank=found[row].rank,
                candidates=found[row].candidates,
                top=tuple((dataset.titles[item - 1], item == target) for item in found[row].top),
                best=len(answers) > 1 and found[row].rank == first,
            )
            for label, found in answers.items()
        ),
    )


def _titles(dataset: Dataset, items: IntArray) -> list[str]:
    return [dataset.titles[item - 1] for item in items]


def _note(labels: Sequence[str], candidates: Candidates) -> str:
    among = "the stored candidates of each user" if candidates == "sampled" else "all items that the user has not seen"
    rule = "Users are chosen by rule, not by hand"
    if len(labels) > 1:
        rule += f": where {labels[0]} gains most over {labels[1]}, where it loses most, and a fixed random sample"
    return f"{rule}. Ranks and answers are among {among}. Numbers of users are indices of the dataset, not raw ids."
