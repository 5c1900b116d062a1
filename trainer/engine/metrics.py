"""What a person sees of a run: progress bar, log lines, `metrics.jsonl`, TensorBoard. Rank 0 only."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

from trainer.config import RunConfig, dump_config, flatten
from trainer.runs.folder import RunFolder

log = logging.getLogger(__name__)

_USUAL = ("HR@10", "NDCG@10", "MRR")


class Recorder:
    """Writes a run's numbers; does nothing on ranks other than 0."""

    def __init__(self, run: RunFolder, *, total_steps: int, done_steps: int, enabled: bool) -> None:
        self._enabled = enabled
        self._total = total_steps
        self._lost = False
        self._clock = Clock(done_steps)
        if enabled:
            self._metrics = (run.path / "metrics.jsonl").open("ab", buffering=0)
            self._board: Any = open_board(run.path, run.config(), done_steps=done_steps)
            self._bar = tqdm(
                total=total_steps,
                initial=done_steps,
                disable=not sys.stderr.isatty(),
                dynamic_ncols=True,
                # Without tqdm's own estimate, which knows nothing of validations.
                bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._enabled:
            self._bar.close()
            self._metrics.close()
            with suppress(OSError):
                self._board.close()

    def step(self, step: int, scalars: Mapping[str, float], *, write: bool) -> None:
        """A training step; its numbers are written only every few steps."""
        if not self._enabled:
            return
        # Before the update, which draws the bar.
        self._bar.set_postfix_str(f"loss {scalars['train/loss']:.4f}, ETA {self.eta(step)}", refresh=False)
        self._bar.update()
        if write:
            self._write(step, scalars)
            speed = scalars.get("speed/useful_tokens_per_second") or scalars["speed/users_per_second"]
            unit = "tokens/s" if "speed/useful_tokens_per_second" in scalars else "users/s"
            self._say(
                f"step {step}/{self._total}  loss {scalars['train/loss']:.4f}  lr {scalars['train/lr']:.2e}  "
                f"{speed:,.0f} {unit}  ETA {self.eta(step)}"
            )

    def validation(self, step: int, metrics: Mapping[str, float], *, chosen: str, better: bool, seconds: float) -> None:
        """A finished validation; `chosen` is the metric by which the best one is known."""
        if not self._enabled:
            return
        self._clock.validated(seconds)
        self._write(
            step,
            {f"valid/{name}": value for name, value in metrics.items()} | {"speed/validation_seconds": seconds},
        )
        names = _USUAL if chosen in _USUAL else (chosen, *_USUAL[1:])
        shown = "  ".join(f"{name} {metrics[name]:.4f}" for name in names if name in metrics)
        self._say(
            f"step {step}/{self._total}  validation  {shown}  ({seconds:.1f} s){'  best so far' if better else ''}"
        )

    def expect_validations(self, count: int) -> None:
        """How many validations are still to come, for the ETA."""
        self._clock.validations_left = count

    def eta(self, step: int) -> str:
        """Time left as h:mm:ss, validations included."""
        seconds = int(self._clock.seconds_left(step, self._total))
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"

    def _write(self, step: int, scalars: Mapping[str, float]) -> None:
        line = json.dumps({"step": step, "time": round(time.time(), 3), **scalars}) + "\n"
        try:
            self._metrics.write(line.encode())
            for name, value in scalars.items():
                self._board.add_scalar(tag(name), value, step)
            self._board.flush()
        except OSError as error:  # a full disk: numbers are lost, the run is not
            if not self._lost:
                log.warning("metrics from step %d on could not be written (%s); the run goes on", step, error)
            self._lost = True

    def _say(self, line: str) -> None:
        with self._bar.external_write_mode(file=sys.stderr):
            log.info(line)


class Clock:
    """Predicts the time left from the steps and validations since this process started."""

    def __init__(self, done_steps: int) -> None:
        self._first = done_steps
        self._start = time.monotonic()
        self._validation_seconds = 0.0
        self._validations = 0
        self.validations_left = 0

    def validated(self, seconds: float) -> None:
        """Tell of one validation."""
        self._validation_seconds += seconds
        self._validations += 1

    def seconds_left(self, step: int, total: int) -> float:
        """Remaining steps and validations at the mean pace so far."""
        stepping = time.monotonic() - self._start - self._validation_seconds
        per_step = stepping / max(step - self._first, 1)
        per_validation = self._validation_seconds / max(self._validations, 1)
        return per_step * (total - step) + per_validation * self.validations_left


def log_to(path: Path | None) -> None:
    """Send the trainer's log lines to the terminal and, on the main rank, to `path`."""
    handlers: list[logging.Handler] = []
    if path is not None:
        handlers = [logging.StreamHandler(sys.stderr), logging.FileHandler(path, encoding="utf-8")]
    root = logging.getLogger("trainer")
    root.setLevel(logging.INFO)
    root.propagate = False
    root.handlers = handlers or [logging.NullHandler()]
    logging.raiseExceptions = False  # a full disk loses lines of log.txt, which is no reason for tracebacks
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))


_COMPARED = {"seed", "system", "train"}
"""What of the configuration is a column of the table of runs."""


_METRICS = ("HR@10", "NDCG@10", "MRR")


def tag(name: str) -> str:
    """What a number of `metrics.jsonl` is called: TensorBoard sorts groups by name and unfolds the first two, which
    shall be those of learning (`train/`, `valid/`), and not speed and memory."""
    return name.replace("speed/", "work/").replace("memory/", "work/memory_")


def open_board(path: Path, config: RunConfig, *, done_steps: int) -> SummaryWriter:
    """The writer of a run's events; points of steps that a resumed run repeats are hidden."""
    board: Any = SummaryWriter(str(path), purge_step=done_steps + 1)
    text = "".join(f"    {line}\n" for line in dump_config(config).splitlines())  # indented: shown as it stands
    board.add_text("config", text, global_step=done_steps)
    settings = flatten(config.model_dump(mode="json", include=_COMPARED))
    columns = {".".join(keys): _shown(value) for keys, value in settings if value is not None}
    # Names alone: TensorBoard takes the values from the curves.
    metrics = dict.fromkeys((f"valid/{name}" for name in dict.fromkeys((config.train.metric, *_METRICS))), 0.0)
    for summary in hparams(columns, metrics):  # type: ignore[no-untyped-call]
        board.file_writer.add_summary(summary)
    writer: SummaryWriter = board
    return writer


def _shown(value: object) -> str | float:
    """As TensorBoard takes it: numbers are sorted as such."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
