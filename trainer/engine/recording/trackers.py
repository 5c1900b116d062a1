"""Where a run's metrics go besides `metrics.jsonl`: TensorBoard, Weights & Biases, MLflow, Trackio. Rank 0 only.

A tracker that fails warns once and is left out from then on: a service that cannot be reached does not end a training.
Project and server are set by each tracker's own environment variables (`WANDB_PROJECT`, `WANDB_MODE=offline`,
`MLFLOW_TRACKING_URI`, `MLFLOW_EXPERIMENT_NAME`, `TRACKIO_DIR`).
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from trainer.config import RunConfig, TrackerName, flatten
from trainer.engine.recording.board import Board
from trainer.runs.atomic import write_atomically

PROJECT = "llm-srec"
"""Name of the project or experiment that runs are filed under by default."""
_IDS = "trackers.json"
"""File in the run folder: the id that each tracker knows the run by, so that a resumed run continues there."""
_MOST_PARAMETERS = 100
"""MLflow's limit per request."""

Result = TypeVar("Result")

log = logging.getLogger(__name__)


class Tracker(Protocol):
    """A place for a run's metrics."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write a line of `metrics.jsonl`."""

    def validated(
        self, step: int, total: int, metrics: Mapping[str, float], *, chosen: str, better: bool, samples: str
    ) -> None:
        """Write what a tracker shows of a validation beyond its metrics, which `write` gets.

        Args:
            total: steps of the run.
            chosen: the metric that selects the best checkpoint.
            better: whether this is the best so far.
            samples: answers to a few users, in markdown; may be empty.
        """

    def tested(self, step: int, metrics: Mapping[str, Mapping[str, float]]) -> None:
        """Write test metrics by history order."""

    def close(self) -> None:
        """Write what is left."""


class Trackers:
    """All trackers of a run."""

    def __init__(self, path: Path, config: RunConfig, names: Sequence[TrackerName], *, done_steps: int) -> None:
        """Open trackers.

        Args:
            path: run folder.
            done_steps: steps of the checkpoint that the run resumes from; TensorBoard hides points after them.
        """
        openers: dict[TrackerName, Callable[[], Tracker]] = {
            "tensorboard": lambda: Board(path, config, done_steps=done_steps),
            "wandb": lambda: _WandB(path, config),
            "mlflow": lambda: _MLflow(path, config),
            "trackio": lambda: _Trackio(path, config),
        }
        self._open: dict[TrackerName, Tracker] = {}
        for name in dict.fromkeys(names):
            with suppress(_TrackerFailedError):
                self._open[name] = _guarded(name, openers[name])

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """See `Tracker.write`."""
        self._each(lambda tracker: tracker.write(step, scalars))

    def validated(
        self, step: int, total: int, metrics: Mapping[str, float], *, chosen: str, better: bool, samples: str
    ) -> None:
        """See `Tracker.validated`."""
        self._each(
            lambda tracker: tracker.validated(step, total, metrics, chosen=chosen, better=better, samples=samples)
        )

    def tested(self, step: int, metrics: Mapping[str, Mapping[str, float]]) -> None:
        """See `Tracker.tested`."""
        self._each(lambda tracker: tracker.tested(step, metrics))

    def close(self) -> None:
        """See `Tracker.close`."""
        self._each(lambda tracker: tracker.close())

    def _each(self, do: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._open.items()):
            try:
                _guarded(name, partial(do, tracker))
            except _TrackerFailedError:
                del self._open[name]


def _guarded(name: TrackerName, do: Callable[[], Result]) -> Result:
    try:
        return do()
    except Exception as error:  # of a library or a service that the training does not depend on
        log.warning("%s is left out from now on (%s: %s); training continues", name, type(error).__name__, error)
        raise _TrackerFailedError from error


class _TrackerFailedError(Exception):
    """A tracker failed and has been reported."""


class _Scalars(ABC):
    """A tracker without a layout of its own: everything is a scalar."""

    @abstractmethod
    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """See `Tracker.write`."""

    def validated(
        self, step: int, total: int, metrics: Mapping[str, float], *, chosen: str, better: bool, samples: str
    ) -> None:
        del total, samples
        if better:
            self.write(step, {f"best/{chosen}": metrics[chosen]})

    def tested(self, step: int, metrics: Mapping[str, Mapping[str, float]]) -> None:
        self.write(step, {f"test_{order}/{name}": value for order, of in metrics.items() for name, value in of.items()})


class _WandB(_Scalars):
    """Weights & Biases. Points of steps that a resumed run repeats are dropped by it; they are the same."""

    def __init__(self, path: Path, config: RunConfig) -> None:
        import wandb

        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), name=path.name, id=_id(path, "wandb"), resume="allow",
            dir=path, config=_settings(config), settings=wandb.Settings(console="off"),
        )  # fmt: skip

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        self._run.finish()


class _MLflow(_Scalars):
    """MLflow, by its client: several runs may be open in one process, and none becomes the active one."""

    def __init__(self, path: Path, config: RunConfig) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client: Any = MlflowClient()
        known = _read_ids(path).get("mlflow")
        if known is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            experiment = self._client.get_experiment_by_name(name)
            number = experiment.experiment_id if experiment else self._client.create_experiment(name)
            known = self._client.create_run(number, run_name=path.name).info.run_id
            settings = [Param(key, str(value)) for key, value in _settings(config).items()]
            for start in range(0, len(settings), _MOST_PARAMETERS):
                self._client.log_batch(known, params=settings[start : start + _MOST_PARAMETERS])
            _write_id(path, "mlflow", known)
        else:
            self._client.update_run(known, status="RUNNING")
        self._run = known

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [Metric(key.replace("@", "_at_"), value, now, step) for key, value in scalars.items()]
        self._client.log_batch(self._run, metrics=metrics)

    def close(self) -> None:
        self._client.set_terminated(self._run)


class _Trackio(_Scalars):
    """Trackio, which resumes a run by its name."""

    def __init__(self, path: Path, config: RunConfig) -> None:
        import trackio

        name = f"{path.name}-{_id(path, 'trackio')}"
        self._run: Any = trackio.init(
            project=PROJECT, name=name, config=_settings(config), resume="allow", embed=False, auto_log_cpu=False
        )

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        self._run.finish()


def _settings(config: RunConfig) -> dict[str, Any]:
    return {".".join(keys): value for keys, value in flatten(config.model_dump(mode="json"))}


def _id(path: Path, name: TrackerName) -> str:
    """The id of a run that chooses its own; a new one is kept in the run folder."""
    known = _read_ids(path).get(name)
    if known is None:
        known = secrets.token_hex(4)
        _write_id(path, name, known)
    return known


def _read_ids(path: Path) -> dict[str, str]:
    with suppress(OSError, ValueError):
        return {str(name): str(number) for name, number in json.loads((path / _IDS).read_text()).items()}
    return {}


def _write_id(path: Path, name: TrackerName, number: str) -> None:
    write_atomically(path / _IDS, json.dumps(_read_ids(path) | {name: number}) + "\n")
