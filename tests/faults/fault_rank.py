"""Ranks with injected faults: the real `launchers/train.py`, with real signals, kills and full disks at moments that a
test chooses.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from benchmarks.common import ranks as plain
from benchmarks.common.inject import act
from benchmarks.common.ranks import Ranks

Preset = Callable[..., Path]


@dataclass(frozen=True)
class Fault:
    """A fault to inject into a rank.

    Args:
        step: 0 for what a resumed run does before its first step.
        at: `data`, `step` (before it), `loss` (NaN gradient), `sync 3` (before the third file of a save is synced),
            `remove 1` (in the middle of the first old checkpoint that is removed), `valid 2` or `test 2` (before the
            second batch of users that are ranked since the step).
        do: as `act` takes it (`benchmarks/common/inject.py`); `nan` only for `loss`.
        every: repeat it at each later step.
    """

    rank: int
    step: int
    at: str
    do: str
    every: bool = False


def start_ranks(folder: Path, words: list[str], faults: list[Fault] | None = None, *, ranks: int = 2) -> Ranks:
    """Start `launchers/train.py WORDS` on `ranks` ranks; their outputs go to `folder`."""
    return plain.start_ranks(folder, words, ranks=ranks, prepare=partial(_plant, faults or []))


def _plant(all_faults: list[Fault], rank: int) -> None:
    from trainer.data.loader import StepLoader
    from trainer.engine import checkpoint, loop
    from trainer.engine.rank_status import NonFiniteError
    from trainer.evaluation.protocol import Ranking
    from trainer.evaluation.rankers import VectorRanker
    from trainer.runs import atomic

    faults = [fault for fault in all_faults if fault.rank == rank]
    now = {"step": 1, "sync": 0, "remove": 0, "valid": 0, "test": 0}

    def meet(place: str) -> None:
        for fault in faults:
            if fault.at == place and (fault.step == now["step"] or (fault.every and fault.step < now["step"])):
                act(fault.do)

    def after_the_step(kind: str) -> None:
        now[kind] += 1
        now["step"] -= 1
        meet(f"{kind} {now[kind]}")
        now["step"] += 1

    steps, guarded_step, sync = StepLoader.steps, loop._guarded_step, atomic.sync
    evaluate, rank_vectors, ranked = Ranking.evaluate_together, VectorRanker.rank, list[str]()

    def faulty_steps(loader: Any, first: int, total: int) -> Any:
        now["step"] = first + 1
        batches = steps(loader, first, total)
        while True:
            meet("data")
            yield next(batches)

    def faulty_step(engine: Any, seed: int, batches: Any, lr: float, step: int, *rest: Any) -> Any:
        now.update(sync=0, remove=0, valid=0, test=0)
        meet("step")
        loss = engine.model.loss
        if any(fault.at == "loss" and fault.step == step + 1 for fault in faults):
            engine.model.loss = lambda terms: loss(terms._make(_poisoned(term) for term in terms))
        before = _trained(engine)
        try:
            report = guarded_step(engine, seed, batches, lr, step, *rest)
        except NonFiniteError:
            print("parameters moved:", any((_trained(engine)[name] != value).any() for name, value in before.items()))
            raise
        now["step"] = step + 2  # the next step; `after_the_step` subtracts 1: saves belong to this one
        return report

    def faulty_sync(path: Path) -> None:
        after_the_step("sync")
        sync(path)

    def faulty_rmtree(path: Path, **options: Any) -> None:
        if path.name.startswith(".removed-"):
            next(path.iterdir()).unlink()
            after_the_step("remove")
        shutil.rmtree(path, **options)

    def noted_evaluate(ranking: Any, splits: Any, *rest: Any, **options: Any) -> Any:
        ranked[:] = splits
        return evaluate(ranking, splits, *rest, **options)

    def faulty_rank_vectors(ranker: Any, held_out: Any) -> Any:
        (split,) = ranked
        after_the_step(split)
        print(f"ranks {split} {now[split]}")
        return rank_vectors(ranker, held_out)

    planted: list[tuple[object, str, object]] = [
        (StepLoader, "steps", faulty_steps),
        (loop, "_guarded_step", faulty_step),
        (checkpoint, "sync", faulty_sync),  # checkpoints sync their files, `write_atomically` its own
        (atomic, "sync", faulty_sync),
        (checkpoint, "shutil", SimpleNamespace(rmtree=faulty_rmtree)),
        (Ranking, "evaluate_together", noted_evaluate),
        (VectorRanker, "rank", faulty_rank_vectors),
    ]
    for owner, name, faulty in planted:
        patch.object(owner, name, faulty).start()


def _trained(engine: Any) -> dict[str, Any]:
    """Copy this rank's part of the trained parameters."""
    held = {name: getattr(p, "ds_tensor", p) for name, p in engine.trained.items()}
    return {name: value.detach().clone() for name, value in held.items()}


def _poisoned(term: Any) -> Any:
    """Return the term with a hook that turns its gradient into NaN."""
    if getattr(term, "requires_grad", False):
        term = term.clone()
        term.register_hook(lambda gradient: gradient * float("nan"))
    return term
