"""Progress and metrics of a run: progress bar, log lines, `metrics.jsonl`, trackers. Rank 0 only."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from tqdm import tqdm

from trainer.engine.recording.board import MAIN_METRICS
from trainer.engine.recording.trackers import Trackers
from trainer.runs.folder import RunFolder

_QUIET_SECONDS = 10.0
"""Least time between log lines of steps; small models take hundreds of steps meanwhile. `metrics.jsonl` has them."""

log = logging.getLogger(__name__)


class Recorder:
    """Reports and records a run's progress and metrics; a no-op on ranks other than 0."""

    def __init__(self, run: RunFolder, *, total_steps: int, done_steps: int, enabled: bool) -> None:
        self._enabled = enabled
        self._run = run
        self._total = total_steps
        self._write_failed = False
        self._last_line = float("-inf")
        self._clock = Clock(done_steps)
        if enabled:
            self._open(done_steps)
            self._bar = tqdm(
                total=total_steps,
                initial=done_steps,
                disable=not sys.stderr.isatty(),
                dynamic_ncols=True,
                # Without tqdm's own ETA, which does not account for validations.
                bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._enabled:
            self._bar.close()
            self._close()

    def reopen(self, done_steps: int) -> None:
        """Open new files, because the run folder was removed and made again."""
        if self._enabled:
            self._close()
            self._open(done_steps)

    def step(self, step: int, scalars: Mapping[str, float], *, write: bool) -> None:
        """Report a training step; without `write` only the progress bar moves."""
        if not self._enabled:
            return
        # Before `update`, which redraws the bar.
        self._bar.set_postfix_str(f"loss {scalars['train/loss']:.4f}, ETA {self.eta(step)}", refresh=False)
        self._bar.update()
        if write:
            self._write(step, scalars)
            now = time.monotonic()
            if now - self._last_line < self._quiet_seconds and step < self._total:
                return
            self._last_line = now
            speed = scalars.get("speed/useful_tokens_per_second") or scalars["speed/users_per_second"]
            unit = "tokens/s" if "speed/useful_tokens_per_second" in scalars else "users/s"
            self._log(
                f"step {step}/{self._total}  loss {scalars['train/loss']:.4f}  lr {scalars['train/lr']:.2e}  "
                f"{speed:,.0f} {unit}  ETA {self.eta(step)}"
            )

    def validation(
        self,
        step: int,
        metrics: Mapping[str, float],
        *,
        chosen: str,
        better: bool,
        seconds: float,
        samples: str = "",
    ) -> None:
        """Report a finished validation.

        Args:
            chosen: the metric that selects the best checkpoint.
            better: whether this is the best so far.
            seconds: its duration.
            samples: answers to a few users, in markdown, for trackers that show text.
        """
        if not self._enabled:
            return
        self._clock.validated(seconds)
        self._write(
            step,
            {f"valid/{name}": value for name, value in metrics.items()} | {"speed/validation_seconds": seconds},
        )
        self._trackers.validated(step, self._total, metrics, chosen=chosen, better=better, samples=samples)
        names = MAIN_METRICS if chosen in MAIN_METRICS else (chosen, *MAIN_METRICS[1:])
        shown = "  ".join(f"{name} {metrics[name]:.4f}" for name in names if name in metrics)
        self._log(
            f"step {step}/{self._total}  validation  {shown}  ({seconds:.1f} s){'  best so far' if better else ''}"
        )

    def expect_validations(self, count: int) -> None:
        """Set how many validations remain, for the ETA."""
        self._clock.validations_left = count

    def eta(self, step: int) -> str:
        """Remaining time as h:mm:ss, validations included."""
        seconds = int(self._clock.seconds_left(step, self._total))
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"

    def _open(self, done_steps: int) -> None:
        self._metrics = (self._run.path / "metrics.jsonl").open("ab", buffering=0)  # a kill loses no finished line
        config = self._run.config()
        self._quiet_seconds = _QUIET_SECONDS if config.train.log_every > 1 else 0.0  # 1: every step was asked for
        self._trackers = Trackers(self._run.path, config, config.train.trackers, done_steps=done_steps)

    def _close(self) -> None:
        self._metrics.close()
        self._trackers.close()

    def _write(self, step: int, scalars: Mapping[str, float]) -> None:
        line = json.dumps({"step": step, "time": round(time.time(), 3), **scalars}) + "\n"
        try:
            self._metrics.write(line.encode())
        except OSError as error:  # a full disk costs metrics, not the run; one warning is enough
            if not self._write_failed:
                log.warning("metrics from step %d on could not be written (%s); training continues", step, error)
            self._write_failed = True
        self._trackers.write(step, scalars)

    def _log(self, line: str) -> None:
        # Clears the bar first, so that the line does not break it.
        with self._bar.external_write_mode(file=sys.stderr):
            log.info(line)


class Clock:
    """Estimates the remaining time from the steps and validations since this process started."""

    def __init__(self, done_steps: int) -> None:
        self._first = done_steps
        self._start = time.monotonic()
        self._validation_seconds = 0.0
        self._validations = 0
        self.validations_left = 0

    def validated(self, seconds: float) -> None:
        """Record a validation that took this long."""
        self._validation_seconds += seconds
        self._validations += 1

    def seconds_left(self, step: int, total: int) -> float:
        """Seconds for the remaining steps and validations at the mean pace so far."""
        stepping = time.monotonic() - self._start - self._validation_seconds
        per_step = stepping / max(step - self._first, 1)
        per_validation = self._validation_seconds / max(self._validations, 1)
        return per_step * (total - step) + per_validation * self.validations_left


def log_to(path: Path | None) -> None:
    """Send the trainer's log lines to stderr and `path`; None (ranks other than 0) drops them."""
    handlers: list[logging.Handler] = []
    if path is not None:
        handlers = [logging.StreamHandler(sys.stderr), logging.FileHandler(path, encoding="utf-8")]
    root = logging.getLogger("trainer")
    root.setLevel(logging.INFO)
    root.propagate = False
    root.handlers = handlers or [logging.NullHandler()]
    logging.raiseExceptions = False  # lines of log.txt lost to a full disk should not print tracebacks
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
