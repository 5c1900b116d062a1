"""One rank of a run that meets faults: the real `launchers/train.py`, with real signals, kills and full disks at
moments that a test chooses.

Ranks are forked from a server that has imported torch and DeepSpeed once, because importing is most of a short run.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from helpers import ROOT

Preset = Callable[..., Path]

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["fault_rank", "deepspeed", "launchers.testing", "trainer.engine.loop", "trainer.engine.prepare"]
)


@dataclass(frozen=True)
class Fault:
    """Something that happens to a rank.

    Args:
        step: 0 for what a run that goes on does before its first step.
        at: `data`, `step` (before it), `loss` (NaN gradient), `sync 3` (before the third file of a save is synced),
            `valid 2` or `test 2` (before the second batch of users that are ranked since the step).
        do: name of a signal for the rank itself, `raise`, `sleep SECONDS`, `nan`, `fill FILE` or `remove FILE`.
        every: again at each step from then on.
    """

    rank: int
    step: int
    at: str
    do: str
    every: bool = False


@dataclass
class Ranks:
    """The processes of a run."""

    processes: list[ForkServerProcess]
    folder: Path
    codes: list[int | None] = field(default_factory=list)

    def wait(self, timeout: float = 180) -> list[int | None]:
        """Exit codes; a rank that is still there after the time-out is killed and has None."""
        end = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        self.codes = [process.exitcode for process in self.processes]
        self.kill()
        return self.codes

    def end_of(self, rank: int, timeout: float = 180) -> int | None:
        """Exit code of one rank; None after the time-out."""
        self.processes[rank].join(timeout)
        return self.processes[rank].exitcode

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def said(self, rank: int) -> str:
        """What a rank wrote to its terminal."""
        return (self.folder / f"{rank}.out").read_text()

    @property
    def all_said(self) -> str:
        return "".join(self.said(rank) for rank in range(len(self.processes)))


def start_ranks(folder: Path, words: list[str], faults: list[Fault] | None = None, *, ranks: int = 2) -> Ranks:
    """Start `launchers/train.py WORDS` on some ranks; their outputs go to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *sys.path])  # the fork server's, when it starts
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    processes = []
    for rank in range(ranks):
        environment = {
            "DS_ACCELERATOR": "cpu", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        }  # fmt: skip
        mine = [fault for fault in faults or [] if fault.rank == rank]
        process = FORKS.Process(target=run_rank, args=(environment, words, mine, folder / f"{rank}.out"), daemon=True)
        process.start()
        processes.append(process)
    return Ranks(processes, folder)


def run_rank(environment: dict[str, str], words: list[str], faults: list[Fault], output: Path) -> None:
    """The process of one rank."""
    os.environ.update(environment)
    sys.argv = ["train.py", *words]
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    from launchers.command import leave, run_command
    from launchers.train import main

    _plant(faults)
    leave(run_command(main))


def _plant(faults: list[Fault]) -> None:
    from trainer.engine import checkpoint, loop
    from trainer.engine.vitals import NonFiniteError
    from trainer.evaluation.protocol import Evaluator

    now = {"step": 1, "sync": 0, "valid": 0, "test": 0}

    def meet(place: str) -> None:
        for fault in faults:
            if fault.at == place and (fault.step == now["step"] or (fault.every and fault.step < now["step"])):
                _do(fault.do)

    def after_the_step(kind: str) -> None:
        now[kind] += 1
        now["step"] -= 1
        meet(f"{kind} {now[kind]}")
        now["step"] += 1

    steps, guarded_step, sync = loop._steps, loop._guarded_step, checkpoint._sync
    rank_vectors = Evaluator._rank_vectors

    def faulty_steps(feed: Any, schedule: Any, done: int) -> Any:
        now["step"] = done + 1
        batches = steps(feed, schedule, done)
        while True:
            meet("data")
            yield next(batches)

    def faulty_step(engine: Any, seed: int, batches: Any, lr: float, step: int, *rest: Any) -> Any:
        now.update(sync=0, valid=0, test=0)
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
        now["step"] = step + 2  # what comes next: a save of this step is named by its own number below
        return report

    def faulty_sync(path: Path) -> None:
        after_the_step("sync")
        sync(path)

    def faulty_rank_vectors(evaluator: Any, model: Any, items: Any, histories: Any, targets: Any, split: Any) -> Any:
        after_the_step(split)
        print(f"ranks {split} {now[split]}")
        return rank_vectors(evaluator, model, items, histories, targets, split)

    loop._steps, loop._guarded_step, checkpoint._sync = faulty_steps, faulty_step, faulty_sync
    Evaluator._rank_vectors = faulty_rank_vectors  # type: ignore[method-assign]


def _trained(engine: Any) -> dict[str, Any]:
    """A copy of what this rank holds of the trained parameters."""
    held = {name: getattr(p, "ds_tensor", p) for name, p in engine.trained.items()}
    return {name: value.detach().clone() for name, value in held.items()}


def _poisoned(term: Any) -> Any:
    """The same numbers, whose gradient becomes NaN."""
    if term.requires_grad:
        term = term.clone()
        term.register_hook(lambda gradient: gradient * float("nan"))
    return term


def _do(what: str) -> None:
    name, _, argument = what.partition(" ")
    if name.startswith("SIG"):
        os.kill(os.getpid(), signal.Signals[name])
    elif name == "raise":
        raise RuntimeError(argument)
    elif name == "sleep":
        time.sleep(float(argument))
    elif name == "remove":
        Path(argument).unlink()
    elif name == "fill":
        with Path(argument).open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass  # the disk is full
