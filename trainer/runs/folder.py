"""The run folder: its files, and how checkpoints are found and checked.

    RUN/config.yaml                     the resolved configuration
    RUN/checkpoints/step-00000094/      weights.safetensors, moments.safetensors, state.json, files.json
    RUN/checkpoints/best.json           step of the best checkpoint
    RUN/item_vectors.safetensors        item vectors of the best checkpoint, where a language model or text encoder
                                        computes them (`trainer/evaluation/item_vectors.py`); may be deleted
    RUN/{log.txt,metrics.jsonl,results.jsonl}
    RUN/ranks/                          rank of every user's target in the newest evaluation of each kind
                                        (`trainer/reports/user_ranks.py`)
    RUN/events.out.tfevents.*           TensorBoard, one per start; not in a subfolder, so that the run is named RUN
    RUN/{projector_config.pbtxt,00094/}  item vectors and titles for TensorBoard's embedding projector
    RUN/page.html                       page about the run (`llm-srec page`)
    RUN/warm_start.json                 what was carried over from the run of `train.init_from`
    RUN/requeue                         exists if the run stopped for a signal and has to be started again
    RUN/lock                            while a process trains: locked, and names it (`trainer/runs/lock.py`)
    RUN/stacks-rank-N.txt               stacks of rank N's threads, if it was stuck or crashed

`files.json` has the sha256 of the other files and is written last, so a checkpoint without it is incomplete.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import Field, TypeAdapter, ValidationError

from shards.manifest import file_sha256, parse_json
from trainer.config.load import ConfigError, dump_config, load_config, with_absolute_paths
from trainer.config.schema import RunConfig
from trainer.runs.atomic import write_atomically

log = logging.getLogger(__name__)

WEIGHTS, MOMENTS, STATE, FILES = "weights.safetensors", "moments.safetensors", "state.json", "files.json"
EXPORTED = (WEIGHTS, STATE)
"""Files of the checkpoint in an exported run, which cannot be resumed."""
_TRAIN_ON = "resume the training, which repairs it, or train from scratch"
_STEP = re.compile(r"step-(\d{8,})")


class CheckpointError(ValueError):
    """No usable checkpoint, or one that belongs to a different run; the message names the checkpoint and the cure."""


@dataclass(frozen=True)
class Identity:
    """The run that a checkpoint belongs to. Runs with equal identities may use each other's checkpoints."""

    system: str
    config_hash: str
    dataset_fingerprint: str
    catalog_sha256: str
    llm: str = ""
    """Fingerprint of the language model or text encoder that the system starts from."""
    built_on: dict[str, str] = field(default_factory=dict)
    """sha256 of the weights of each run that the system builds on, by key in the system section (`teacher`, ...)."""
    init_from: str = ""
    """sha256 of the weights that training started from (`train.init_from`); empty: from scratch."""

    def as_dict(self) -> dict[str, Any]:
        """The identity as JSON has it: without `init_from` where it is empty, as earlier versions wrote it."""
        found = asdict(self)
        if not self.init_from:
            del found["init_from"]
        return found


Steps = Annotated[int, Field(ge=0, lt=2**53)]


@dataclass(frozen=True)
class Progress:
    """Progress of a run. All other state that resuming needs is computed from it."""

    step: Steps = 0
    """Optimizer steps done."""
    validations: Steps = 0
    """Validations done; the learning rate has decayed this many times."""
    stale: Steps = 0
    """Validations since the best one, for early stopping."""
    validated_step: Steps = 0
    """Step of the last validation. May be behind `step` when a validation is due: a run that stops for a signal saves
    first and validates when it resumes."""
    best_step: Steps = 0
    """Step of the best checkpoint."""
    best_value: float = float("-inf")
    """Validation metric of the best checkpoint."""
    world_size: int = 1
    """Ranks that wrote the checkpoint."""
    started: float = 0.0
    """Unix time at which the run began its first step, in seconds."""
    useful_seconds: float = 0.0
    """Seconds spent on these steps, without work that a crash lost. Divided by the time since `started`: goodput."""


_STATE: Final = TypeAdapter(tuple[Progress, Identity])


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    progress: Progress
    identity: Identity

    @property
    def weights(self) -> Path:
        return self.path / WEIGHTS

    @property
    def moments(self) -> Path:
        return self.path / MOMENTS

    @property
    def weights_sha256(self) -> str:
        digest: str = parse_json((self.path / FILES).read_text())[WEIGHTS]
        return digest


@dataclass(frozen=True)
class RunFolder:
    """Paths and checkpoints of a run folder, which may not exist yet."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def item_vectors(self) -> Path:
        """File that keeps the item vectors of the best checkpoint."""
        return self.path / "item_vectors.safetensors"

    @property
    def log(self) -> Path:
        """Log lines of all starts of the run."""
        return self.path / "log.txt"

    @property
    def lock(self) -> Path:
        """File that names the process that trains in this folder."""
        return self.path / "lock"

    def stacks(self, rank: int) -> Path:
        """File that a stuck or crashing rank dumps the stacks of its threads to."""
        return self.path / f"stacks-rank-{rank}.txt"

    def collectives(self, rank: int) -> Path:
        """File that a stuck rank dumps its last collectives to: `torchfrtrace --prefix nccl-rank- RUN`."""
        return self.path / f"nccl-rank-{rank}"

    @property
    def warm_start(self) -> Path:
        """What was carried over from the run of `train.init_from`, as JSON."""
        return self.path / "warm_start.json"

    @property
    def requeue(self) -> Path:
        """Empty file by which a run asks its batch script to requeue the job."""
        return self.path / "requeue"

    def config(self) -> RunConfig:
        """Load the resolved configuration of the run.

        Raises:
            ConfigError: not a run folder.
        """
        file = self.path / "config.yaml"
        if not file.is_file():
            raise ConfigError(f"{self.path} is not a run folder (no config.yaml in it): train first, or fix the path")
        return load_config(file)

    def write_config(self, config: RunConfig) -> None:
        """Write the resolved configuration of the run; makes the folder if there is none."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path / "config.yaml", dump_config(with_absolute_paths(config)))

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, oldest first."""
        found = self.checkpoints.iterdir() if self.checkpoints.is_dir() else []
        matches = [_STEP.fullmatch(path.name) for path in found]  # skips copies such as step-00000094.bak
        return sorted(int(match[1]) for match in matches if match)

    def step_path(self, step: int) -> Path:
        """Folder of the checkpoint of a step."""
        return self.checkpoints / f"step-{step:08d}"

    def newest(self) -> Checkpoint | None:
        """Find the newest intact checkpoint; None if there is no checkpoint. Damaged ones are logged and skipped.

        Raises:
            CheckpointError: every checkpoint is damaged.
        """
        damage = []
        for step in reversed(self.steps()):
            try:
                return read_checkpoint(self.step_path(step))
            except CheckpointError as error:
                log.warning("%s; falling back to the previous checkpoint", error)
                damage.append(str(error))
        if damage:
            raise CheckpointError(f"every checkpoint of {self.path} is damaged, first: {damage[0]}; train from scratch")
        return None

    def best(self) -> Checkpoint:
        """Read the checkpoint with the best validation metric.

        Raises:
            CheckpointError: the run has not validated yet, or the checkpoint is damaged.
        """
        marker = self.checkpoints / "best.json"
        if not marker.is_file() and (self.path / FILES).is_file():  # exported: see `trainer/runs/exported.py`
            return read_checkpoint(self.path, EXPORTED)
        if not marker.is_file():
            raise CheckpointError(f"{self.path} has no best checkpoint yet: let it train until its first validation")
        try:
            found = parse_json(marker.read_text())
            step, files_sha256 = int(found["step"]), str(found["files_sha256"])
        except (OSError, ValueError, TypeError, KeyError):
            raise CheckpointError(f"{marker} is damaged; {_TRAIN_ON}") from None
        checkpoint = read_checkpoint(self.step_path(step))
        if file_sha256(checkpoint.path / FILES) != files_sha256:
            raise CheckpointError(
                f"{marker} is damaged (its sha256 is not that of {checkpoint.path / FILES}); {_TRAIN_ON}"
            )
        return checkpoint

    def best_json(self, step: int) -> str:
        """Content of `best.json` that marks the checkpoint of a step as the best."""
        return json.dumps({"step": step, "files_sha256": file_sha256(self.step_path(step) / FILES)})


def read_checkpoint(path: Path, names: Sequence[str] = (WEIGHTS, MOMENTS, STATE)) -> Checkpoint:
    """Read a checkpoint and verify the sha256 of every file.

    Args:
        names: files that it has.

    Raises:
        CheckpointError: the checkpoint is incomplete or damaged; the message names the file.
    """
    try:
        text = (path / FILES).read_text()
        expected: dict[str, str] = parse_json(text)
        digests = {name: expected[name] for name in names}
        # Compared as text: damage to the file itself must show, even where it still parses.
        if text != files_json(digests):
            raise ValueError("not as it was written")
    except (OSError, ValueError, TypeError, KeyError):
        raise CheckpointError(f"checkpoint {path} has no readable {FILES}") from None
    for name, digest in digests.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"checkpoint file {file} is missing")
        if file_sha256(file) != digest:
            raise CheckpointError(f"checkpoint file {file} is damaged (its sha256 differs from {FILES})")
    try:
        state = parse_json((path / STATE).read_text())
        progress, identity = Progress(**state["progress"]), Identity(**state["identity"])
        _STATE.validate_json(json.dumps([asdict(progress), asdict(identity)]), strict=True)
        return Checkpoint(path, progress, identity)
    except ValidationError as error:
        first = error.errors()[0]
        raise CheckpointError(
            f"checkpoint file {path / STATE} is damaged ({first['loc'][-1]}: {first['msg']}); {_TRAIN_ON}"
        ) from None
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"checkpoint file {path / STATE} was written by a different version of this software ({error})"
        ) from None


def files_json(digests: dict[str, str]) -> str:
    """Content of `files.json`, byte for byte."""
    return json.dumps(digests, indent=1)


def state_json(progress: Progress, identity: Identity) -> str:
    """Content of `state.json`."""
    return json.dumps({"progress": asdict(progress), "identity": identity.as_dict()}, indent=1)
