"""The runs of a comparison: their overrides and order, and which of them are finished; torch-free."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shards.manifest import DatasetError, read_manifest
from trainer.config import (
    ConfigError,
    RunConfig,
    applicable_overrides,
    built_on,
    config_hash,
    load_config,
    with_absolute_paths,
)
from trainer.engine.schedule import Schedule
from trainer.reports.results import RESULTS_FILE, Result, latest, read
from trainer.runs.folder import Checkpoint, CheckpointError, RunFolder


@dataclass(frozen=True)
class ComparedRun:
    """One training run of the comparison."""

    preset: Path
    overrides: tuple[str, ...]
    """Overrides for the training command."""
    config: RunConfig
    """The preset with the overrides applied."""
    label: str = ""

    @property
    def name(self) -> str:
        """The run's name in the comparison: its label, or else the name of its preset."""
        return self.label or self.preset.stem

    def builds_on(self, other: ComparedRun) -> bool:
        """Whether this run reads the output of the other run, for example as its teacher."""
        return _resolved(other.config.output) in map(_resolved, built_on(self.config.system).values())


def compared_runs(presets: Sequence[Path], overrides: Sequence[str]) -> list[ComparedRun]:
    """Load the runs, each after the runs that it builds on.

    Args:
        presets: names or YAML files.
        overrides: `section.key=value` applies to every preset whose system has the key,
            `NAME,...:section.key=value` only to the presets of these names. `output=FOLDER` moves run NAME to
            FOLDER/NAME, and the runs that build on it read it there.

    Raises:
        ConfigError: a preset or an override is wrong, or two presets share an output folder.
    """
    root = next((word.partition("=")[2] for word in reversed(overrides) if word.startswith("output=")), None)
    overrides = [word for word in overrides if not word.startswith("output=")]
    own = {preset: _overrides_of(preset, overrides) for preset in dict.fromkeys(presets)}
    for word in overrides:
        _check_used(word, presets)
    # Loaded with the outputs of the presets first, by which presets refer to each other, then with the moved ones.
    unmoved = {preset: load_config(preset, mine) for preset, mine in own.items()}
    new_output = {_resolved(config.output): Path(root or "", preset.stem) for preset, config in unmoved.items()}
    runs = []
    for preset, config in unmoved.items():
        moved = [("output", Path(root, preset.stem))] if root else []
        moved += [
            (f"system.{key}", new_output[_resolved(path)])
            for key, path in built_on(config.system).items()
            if root and _resolved(path) in new_output
        ]
        mine = (*own[preset], *(f"{key}={json.dumps(str(path))}" for key, path in moved))
        runs.append(ComparedRun(preset, mine, load_config(preset, mine)))
    return _ordered(runs)


def finished(config: RunConfig) -> list[Result]:
    """Test results of a finished run, one per history order; empty if the training command still has work to do."""
    try:
        run = RunFolder(config.output)
        checkpoint = run.newest()
        if checkpoint is None or not _is_over(config, run, checkpoint):
            return []
        step = run.best().progress.step
    except (ConfigError, CheckpointError, DatasetError):
        return []  # the training command reports what is wrong
    file = run.path / RESULTS_FILE
    kind = (step, "test", config.evaluation.candidates, config.evaluation.tie)
    found = [
        result
        for result in latest(read(file) if file.is_file() else [])
        if (result.step, result.split, result.candidates, result.tie) == kind
    ]
    return found if {result.history for result in found} >= set(config.evaluation.test_histories) else []


def _is_over(config: RunConfig, run: RunFolder, checkpoint: Checkpoint) -> bool:
    manifest = read_manifest(config.data.path)
    identity, progress = checkpoint.identity, checkpoint.progress
    # A language model at a different path may be a different model: only the training command checks its fingerprint.
    same_paths = run.config().system == with_absolute_paths(config).system
    sources = {key: RunFolder(path).best().weights_sha256 for key, path in built_on(config.system).items()}
    return (
        (identity.config_hash, identity.dataset_fingerprint) == (config_hash(config), manifest.fingerprint)
        and same_paths
        and identity.built_on == sources
        and progress.validated_step == progress.step
        and Schedule.of(config.train, manifest.num_users).is_over(progress, config.train.patience)
    )


def _overrides_of(preset: Path, overrides: Sequence[str]) -> list[str]:
    """Overrides that apply to a preset, without the prefix that scopes them."""
    mine = []
    for word in overrides:
        names, scoped, own = word.partition(":")
        if not scoped or "=" in names:
            mine += applicable_overrides(preset, [word])
        elif preset.stem in names.split(","):
            mine.append(own)
    return mine


def _check_used(word: str, presets: Sequence[Path]) -> None:
    """Reject an override that changes no run: a mistyped key, or a name that no preset has."""
    if any(_overrides_of(preset, [word]) for preset in presets):
        return
    names, scoped, _ = word.partition(":")
    if scoped and "=" not in names:
        raise ConfigError(f"'{word}': no preset is called {names} (one of: {', '.join(p.stem for p in presets)})")
    load_config(presets[0], [word])  # raises, and suggests the closest key


def _ordered(runs: Sequence[ComparedRun]) -> list[ComparedRun]:
    """In the given order, but each run after the runs that it builds on."""
    folders = [_resolved(run.config.output) for run in runs]
    if shared := next((run for run in runs if folders.count(_resolved(run.config.output)) > 1), None):
        raise ConfigError(f"two presets write to {shared.config.output}: compare one of them, or rename one's output")
    ordered: list[ComparedRun] = []
    while waiting := [run for run in runs if run not in ordered]:
        free = [run for run in waiting if not any(run.builds_on(other) for other in waiting)]
        if not free:
            raise ConfigError(f"{waiting[0].preset} builds on its own output {waiting[0].config.output}: fix its paths")
        ordered.append(free[0])
    return ordered


def _resolved(path: Path) -> Path:
    return path.absolute().resolve()
