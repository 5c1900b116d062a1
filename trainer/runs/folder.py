"""The run folder: what a run leaves behind, and how its checkpoints are found and checked.

    RUN/config.yaml                     the resolved configuration
    RUN/checkpoints/step-00000094/      weights.safetensors, moments.safetensors, state.json, files.json
    RUN/checkpoints/best.json           which step is the best one
    RUN/{log.txt,metrics.jsonl,results.jsonl}
    RUN/events.out.tfevents.*           TensorBoard's, one a start; here, so that it names the run by its folder
    RUN/requeue                         there when the run stopped for a signal and wants to be started again

`files.json` holds the sha256 of the other files and is written last, so a checkpoint without it was never finished.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path

from trainer.config.load import ConfigError, load_config
from trainer.config.schema import RunConfig

log = logging.getLogger(__name__)

WEIGHTS, MOMENTS, STATE, FILES = "weights.safetensors", "moments.safetensors", "state.json", "files.json"
_TRAIN_ON = "start the same training again, which mends it, or train again"
_STEP = re.compile(r"step-(\d{8,})")


class CheckpointError(ValueError):
    """No usable checkpoint, or one that belongs to another run; the message says which and the cure."""


@dataclass(frozen=True)
class Identity:
    """What a checkpoint belongs to. Two runs with equal identities may use each other's checkpoints."""

    system: str
    config_hash: str
    dataset_fingerprint: str
    catalog_sha256: str
    llm: str = ""
    """Fingerprint of the language model or text encoder that the system starts from."""
    built_on: dict[str, str] = field(default_factory=dict)
    """sha256 of the weights of each run that the system builds on, by its key in the system's section."""


@dataclass(frozen=True)
class Progress:
    """How far a run is; everything else that resuming needs is arithmetic on it."""

    step: int = 0
    """Optimizer steps done."""
    validations: int = 0
    stale: int = 0
    """Validations since the best one."""
    validated_step: int = 0
    """Step of the last validation: a run that stops for a signal saves first and validates when it goes on."""
    best_step: int = 0
    best_value: float = float("-inf")
    world_size: int = 1
    started: float = 0.0
    """When the run began its first step (seconds since 1970)."""
    useful_seconds: float = 0.0
    """Spent on these steps; what a crash undid is not in it. Over the time since `started` it is the goodput."""


@dataclass(frozen=True)
class Checkpoint:
    """A finished checkpoint on disk."""

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
        digest: str = json.loads((self.path / FILES).read_text())[WEIGHTS]
        return digest


@dataclass(frozen=True)
class RunFolder:
    """A run's folder; it may not exist yet."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def stacks(self, rank: int) -> Path:
        """Where a rank that is stuck writes what its threads were doing."""
        return self.path / f"stacks-rank-{rank}.txt"

    @property
    def requeue(self) -> Path:
        """Empty file by which a run asks its batch script to start it again."""
        return self.path / "requeue"

    def config(self) -> RunConfig:
        """The configuration that the run was started with."""
        file = self.path / "config.yaml"
        if not file.is_file():
            raise ConfigError(f"{self.path} is no run folder (no config.yaml in it): train first, or fix the path")
        return load_config(file)

    def steps(self) -> list[int]:
        """Steps with a checkpoint, oldest first."""
        found = self.checkpoints.iterdir() if self.checkpoints.is_dir() else []
        matches = [_STEP.fullmatch(path.name) for path in found]  # a person's step-00000094.bak is none
        return sorted(int(match[1]) for match in matches if match)

    def step_path(self, step: int) -> Path:
        """Where the checkpoint of that step is."""
        return self.checkpoints / f"step-{step:08d}"

    def newest(self) -> Checkpoint | None:
        """The newest intact checkpoint, or None if there is none at all; damaged ones are named in the log.

        Raises:
            CheckpointError: there are checkpoints, all damaged.
        """
        damage = []
        for step in reversed(self.steps()):
            try:
                return read_checkpoint(self.step_path(step))
            except CheckpointError as error:
                log.warning("%s; using the one before", error)
                damage.append(str(error))
        if damage:
            raise CheckpointError(f"every checkpoint of {self.path} is damaged, first: {damage[0]}; train again")
        return None

    def best(self) -> Checkpoint:
        """The checkpoint with the best validation metric.

        Raises:
            CheckpointError: the run has not validated yet, or the checkpoint is damaged.
        """
        marker = self.checkpoints / "best.json"
        if not marker.is_file():
            raise CheckpointError(f"{self.path} has no best checkpoint yet: let it train until its first validation")
        try:
            found = json.loads(marker.read_text())
            step, files_sha256 = int(found["step"]), str(found["files_sha256"])
        except (OSError, ValueError, TypeError, KeyError):
            raise CheckpointError(f"{marker} is damaged; {_TRAIN_ON}") from None
        checkpoint = read_checkpoint(self.step_path(step))
        if sha256(checkpoint.path / FILES) != files_sha256:
            raise CheckpointError(
                f"{marker} is damaged (it names another checkpoint than {checkpoint.path}); {_TRAIN_ON}"
            )
        return checkpoint

    def best_json(self, step: int) -> str:
        """Content of `best.json` that makes the checkpoint of a step the best one."""
        return json.dumps({"step": step, "files_sha256": sha256(self.step_path(step) / FILES)})


def read_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint whose every file has the sha256 it was written with.

    Raises:
        CheckpointError: it is unfinished or damaged; the message names the file.
    """
    try:
        text = (path / FILES).read_text()
        expected: dict[str, str] = json.loads(text)
        digests = {name: expected[name] for name in (WEIGHTS, MOMENTS, STATE)}
        if text != files_json(digests):
            raise ValueError("not as it was written")
    except (OSError, ValueError, TypeError, KeyError):
        raise CheckpointError(f"checkpoint {path} has no readable {FILES}") from None
    for name, digest in digests.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"checkpoint file {file} is missing")
        if sha256(file) != digest:
            raise CheckpointError(f"checkpoint file {file} is damaged (its sha256 differs from {FILES})")
    try:
        state = json.loads((path / STATE).read_text())
        return Checkpoint(path, Progress(**state["progress"]), Identity(**state["identity"]))
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"checkpoint file {path / STATE} was written by another version of this software ({error})"
        ) from None


def files_json(digests: dict[str, str]) -> str:
    """Content of `files.json`, to the byte."""
    return json.dumps(digests, indent=1)


def state_json(progress: Progress, identity: Identity) -> str:
    """Content of `state.json`."""
    return json.dumps({"progress": asdict(progress), "identity": asdict(identity)}, indent=1)


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
