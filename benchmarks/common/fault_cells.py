"""One cell of the fault matrix (`benchmarks.faults`): a run that meets a fault, what became of it, and its score."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common.inject import Injection, Moment, plant
from benchmarks.common.ranks import Ranks, start_ranks
from benchmarks.common.setting import synthetic_dataset
from trainer.config.load import ConfigError
from trainer.reports.results import RESULTS_FILE, read
from trainer.runs.folder import FILES, MOMENTS, WEIGHTS, CheckpointError, RunFolder

STEPS, SAVE_EVERY, TIMEOUT = 21, 4, 1.5
"""Steps of the run, steps between its checkpoints, and `engine.timeout` in seconds; ten times that at slow places."""
_VALIDATES_AT, _MET_AT = 11, 6
_PATIENCE = 60.0
"""Seconds after which a process that has not ended counts as a survivor."""
_PRESET = Path(__file__).parents[2] / "trainer" / "presets" / "sasrec.yaml"

PHASES: Mapping[str, Moment] = {
    # Of a run that resumes, so that there is a checkpoint to lose: dataset, model and weights are loaded.
    "start": Moment("start", 0),
    "step": Moment("forward", _MET_AT),
    "save": Moment("save", 2 * SAVE_EVERY),
    "validation": Moment("validate", _VALIDATES_AT, wait=2),
    "end": Moment("test", STEPS, wait=2),
}
_IN_A_SAVE = f"/.writing-step-{2 * SAVE_EVERY:08d}/state.json"
"""Opened by rank 0 when weights and moments are written, before the checkpoint is complete."""


@dataclass(frozen=True)
class Fault:
    """A kind of fault, and what a run that meets it should do.

    Args:
        does: as `benchmarks.common.inject.act` takes it; `{folder}` is the cell's.
        cause: pattern of the error that names it.
        shared: no rank is at fault, but what all of them use; injected once.
        survived: the run continues and ends well.
        every: not once, but at each wait of the phase.
        announced: the run continues without checkpoints, and says so at each.
        start: which wait of the start; by the third the ranks have agreed on the weights.
    """

    name: str
    does: str
    cause: str
    shared: bool = False
    survived: bool = False
    every: bool = False
    announced: bool = False
    start: int = 2


_GONE = r"is not responding, last seen in |which hosts the store, is not responding"
FAULTS = (
    Fault("kill", "SIGKILL", _GONE),
    Fault("segv", "segv", "Segmentation fault"),
    Fault("stop", "SIGSTOP", _GONE),
    Fault("held lock", "hold 1000", "nothing else could run in its interpreter"),
    Fault("exception", "raise out of luck", "RuntimeError: out of luck"),
    Fault("exit 0", "exit", _GONE),
    Fault("NaN", "nan", r"(loss|gradient norm|score|weights).* (is|are) .*(nan|NaN)", start=3),
    Fault("slow rank", "sleep 0.15", "is a straggler", survived=True, every=True),
    Fault("full disk", "fill {folder}/fs/filler", "No space left on device", shared=True, announced=True),
    Fault("lost file system", "unmount {folder}/fs", r"{folder}/fs/\S+", shared=True),
)


@dataclass(frozen=True)
class Cell:
    """A fault at a rank in a phase."""

    fault: Fault
    rank: int
    phase: str

    @property
    def name(self) -> str:
        return f"{self.fault.name}/{'any' if self.fault.shared else self.rank}/{self.phase}"

    @property
    def moment(self) -> Moment:
        if self.phase == "save" and self.rank == 0:
            return Moment("", 0, file=_IN_A_SAVE)
        if self.phase == "step" and self.fault.every:
            return Moment("data", _MET_AT, wait=0)  # a slow rank is one that is slow at its own work
        moment = PHASES[self.phase]
        return replace(moment, wait=self.fault.start) if self.phase == "start" else moment

    @property
    def may_be_survived(self) -> bool:
        """Whether ending well is right: nothing is at fault that the run cannot do without."""
        return self.fault.survived

    @property
    def is_named(self) -> bool:
        """Whether there is something to name: stragglers are looked for in steps."""
        return not self.fault.survived or self.phase == "step"


@dataclass
class Outcome:
    """What became of a run that met a fault."""

    codes: list[int | None]
    """Exit code of each rank; None: it had not ended after a minute."""
    seconds: float
    """From the fault to the end of the last process."""
    said: str
    """The errors and warnings of all ranks, one a line."""
    named_ranks: list[int]
    cause_named: bool
    done: int
    """Last step that was done."""
    kept: int
    """Step of the newest checkpoint."""
    resumed_from: int | None = None
    """Step from which the same command resumed; None: it did not."""
    same_end: bool = False
    """Whether the resumed run ended as one without faults: same weights, moments and results, bit for bit."""
    problems: list[str] = field(default_factory=list)

    @property
    def lost(self) -> int:
        """Steps that have to be repeated."""
        return max(self.done - self.kept, 0)


class Bench:
    """Dataset, the same run without faults, and the same run stopped at its first checkpoint."""

    def __init__(self, folder: Path, ranks: int) -> None:
        self.folder, self.ranks = folder, ranks
        words = "--min-train 3 --negatives 19 --shards 4"
        self.data = synthetic_dataset(folder, users=61, items=60, words=words)
        self.undisturbed = RunFolder(folder / "undisturbed")
        start_ranks(folder / "ranks", ["--help"], ranks=1).wait()  # the first start alone imports everything
        self._run_to_end(self.undisturbed.path, None)
        self.stopped = folder / "stopped"
        stop = Injection(0, Moment("forward", SAVE_EVERY - 1), "SIGTERM", folder / "stop")  # noted in the next step
        self._run_to_end(self.stopped, stop)
        assert RunFolder(self.stopped).steps() == [SAVE_EVERY]

    def start(self, output: Path, data: Path, injection: Injection | None, says: Path) -> Ranks:
        """Start the run on all ranks."""
        settings = {
            "output": output, "data.path": data, "data.shuffle_shards": 2,
            "system.dim": 16, "system.max_length": 12, "system.dropout": 0.3,
            "train.batch_size": 10, "train.epochs": 3, "train.validate_every": 1.5, "train.save_every": SAVE_EVERY,
            "train.log_every": 1, "evaluation.batch_size": 7, "engine.threads": 1, "engine.timeout": TIMEOUT,
        }  # fmt: skip
        words = [str(_PRESET), *(f"{key}={value}" for key, value in settings.items())]
        return start_ranks(says, words, ranks=self.ranks, prepare=partial(plant, injection) if injection else None)

    def _run_to_end(self, output: Path, injection: Injection | None) -> None:
        ranks = self.start(output, self.data, injection, self.folder / "ranks")
        if ranks.wait() != [0] * self.ranks:
            raise RuntimeError(ranks.all_said)

    def same_end(self, run: RunFolder) -> bool:
        """Whether a run ended as the undisturbed one, bit for bit."""
        return _end(run) == _end(self.undisturbed)


def run_cell(bench: Bench, cell: Cell) -> Outcome:
    """Run a cell and score it.

    Raises:
        OSError: this needs a mount, and mounting needs root.
    """
    folder = bench.folder / cell.name.replace("/", "-").replace(" ", "-")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    with _file_system(cell.fault, folder) as mount:
        run = RunFolder(folder / "fs/run")
        data = shutil.copytree(bench.data, folder / "fs/data") if cell.fault.name == "lost file system" else bench.data
        if cell.phase == "start":
            shutil.copytree(bench.stopped, run.path)
        outcome = _meet(bench, cell, folder, run, data)
        mount()
        (folder / "fs/filler").unlink(missing_ok=True)
        outcome.done, outcome.kept = max(outcome.done, _last_step(run)), _newest(run)
        resumed = bench.start(run.path, data, None, folder / "resumed")
        codes = resumed.wait(120)
        if codes == [0] * bench.ranks:
            found = re.search(r"resuming from step (\d+)", resumed.said(0))
            outcome.resumed_from = int(found[1]) if found else 0
            outcome.same_end = bench.same_end(run)
        outcome.problems = _problems(bench, cell, outcome, codes)
    if not outcome.problems:  # otherwise it stays for inspection
        shutil.rmtree(folder)
    return outcome


def _meet(bench: Bench, cell: Cell, folder: Path, run: RunFolder, data: Path) -> Outcome:
    """Run until all ranks have ended or are given up."""
    does, mark = cell.fault.does.format(folder=folder), folder / "fault"
    injection = Injection(cell.rank, cell.moment, does, mark, cell.fault.every)
    ranks = bench.start(run.path, data, injection, folder / "ranks")
    end, guards = time.monotonic() + _PATIENCE, set[int]()
    while time.monotonic() < end and any(process.exitcode is None for process in ranks.processes):
        if not mark.exists():  # each watchdog starts its guard long before
            guards |= {child for process in ranks.processes if process.pid for child in _children(process.pid)}
        time.sleep(0.1)
    now = time.time()
    codes = [process.exitcode for process in ranks.processes]
    time.sleep(0.5)  # a guard looks at its rank four times a second
    left = [child for child in guards if _runs(child)]
    for child in left:
        os.kill(child, signal.SIGKILL)
    ranks.kill()
    if not mark.exists():
        raise RuntimeError(f"{cell.name}: the fault was not met\n{ranks.all_said}")
    stacks = "".join(file.read_text() for file in run.path.glob("stacks-*")) if run.path.is_dir() else ""
    lines = [line for line in (ranks.all_said + stacks).splitlines() if _TELLS.search(line)]
    cause = cell.fault.cause.replace("{folder}", re.escape(str(folder)))
    outcome = Outcome(
        codes=codes,
        seconds=round(now - mark.stat().st_mtime, 1),
        said="\n".join(dict.fromkeys(line.replace(str(folder), "") for line in lines)),
        named_ranks=sorted({int(found[1]) for line in lines if (found := _NAMED.search(line))}),
        cause_named=any(re.search(cause, line) for line in lines),
        done=_last_step(run),
        kept=0,
    )
    if left:
        outcome.problems.append("a guard survived")
    return outcome


_TELLS = re.compile(r"error: |warning|is a straggler|could not be written|Fatal Python error|was removed|Error: ")
_NAMED = re.compile(r"(?:error: |\d\d:\d\d:\d\d |on )rank (\d+)")


def _problems(bench: Bench, cell: Cell, outcome: Outcome, resumed: list[int | None]) -> list[str]:
    """What is not as it should be."""
    found = list(outcome.problems)
    found += [f"rank {rank} did not end" for rank, code in enumerate(outcome.codes) if code is None]
    ended_well = not any(outcome.codes)
    if cell.may_be_survived and not ended_well:
        found.append("the run ended")
    if not cell.may_be_survived and ended_well:
        found.append("exit code 0")
    if cell.is_named and not outcome.cause_named:
        found.append("cause not named")
    if cell.is_named and not cell.fault.shared and outcome.named_ranks != [cell.rank]:
        found.append(f"ranks {outcome.named_ranks} named" if outcome.named_ranks else "no rank named")
    if outcome.lost > SAVE_EVERY and not (cell.fault.announced and "could not be written" in outcome.said):
        found.append(f"{outcome.lost} steps lost")
    if outcome.resumed_from is None:
        found.append(f"does not resume (exit codes {resumed})")
    elif outcome.resumed_from != outcome.kept and outcome.kept < STEPS:
        found.append(f"resumes from step {outcome.resumed_from}, not {outcome.kept}")
    elif not outcome.same_end:
        found.append("resumes to a different end")
    return found


@contextmanager
def _file_system(fault: Fault, folder: Path) -> Iterator[Any]:
    """A place for the run at `folder/fs`: 8 MiB for a full disk, and one that can be lost for a lost one.

    Yields:
        A function that mounts it again, with what is on it.
    """
    fs, real = folder / "fs", folder / "real"
    fs.mkdir()
    real.mkdir()
    if fault.name == "full disk":
        options = ["-t", "tmpfs", "-o", "size=8m", "tmpfs"]
    elif fault.name == "lost file system":
        # A file system of its own, so that it is another device than what is below the mount point.
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(real)], capture_output=True, check=False)
        options = ["--bind", str(real)]
    else:
        yield lambda: None
        return

    def mount() -> None:
        if os.path.ismount(fs):
            return
        shutil.rmtree(fs)  # what was written to the folder beneath
        fs.mkdir()
        done = subprocess.run(["mount", *options, str(fs)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise OSError(f"mounting needs root: {done.stderr.strip()}")

    mount()
    try:
        yield mount
    finally:
        for folder in (fs, real):
            if os.path.ismount(folder):
                subprocess.run(["umount", "--lazy", str(folder)], check=False)


def _children(process: int) -> list[int]:
    found: list[int] = []
    for file in Path(f"/proc/{process}/task").glob("*/children"):
        with suppress(OSError):  # that thread has ended
            found += map(int, file.read_text().split())
    return found


def _runs(process: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def _last_step(run: RunFolder) -> int:
    file = run.path / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.is_file() else []
    return max((json.loads(line)["step"] for line in lines), default=0)


def _newest(run: RunFolder) -> int:
    try:
        checkpoint = run.newest()
    except CheckpointError:
        return 0
    return checkpoint.progress.step if checkpoint else 0


def _end(run: RunFolder) -> object:
    try:
        files = json.loads((run.step_path(STEPS) / FILES).read_text())
        best = run.best().progress.step
    except (OSError, ConfigError, CheckpointError):
        return None
    return files[WEIGHTS], files[MOMENTS], best, [result.metrics for result in read(run.path / RESULTS_FILE)]
