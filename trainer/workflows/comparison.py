"""What a comparison runs, in which order, and what of it is done; torch-free."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shards.manifest import DatasetError, read_manifest
from trainer.config import (
    ConfigError,
    RunConfig,
    applicable,
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
    words: tuple[str, ...]
    """Overrides for the training command."""
    config: RunConfig
    """What the two amount to."""

    @property
    def name(self) -> str:
        """What the comparison calls it."""
        return self.preset.stem

    def builds_on(self, other: ComparedRun) -> bool:
        """Whether it reads what the other run leaves."""
        return _place(other.config.output) in map(_place, built_on(self.config.system).values())


def compared_runs(presets: Sequence[Path], words: Sequence[str]) -> list[ComparedRun]:
    """The runs, each behind those that it builds on.

    Args:
        words: `section.key=value` for every preset whose system has the key, `NAME,...:section.key=value` for the
            presets of these names alone. `output=FOLDER` puts run NAME into FOLDER/NAME, and what builds on it there
            follows.

    Raises:
        ConfigError: a preset or a word is wrong, or two presets share a folder.
    """
    root = next((word.partition("=")[2] for word in reversed(words) if word.startswith("output=")), None)
    words = [word for word in words if not word.startswith("output=")]
    own = {preset: _words_of(preset, words) for preset in dict.fromkeys(presets)}
    for word in words:
        _check_used(word, presets)
    alone = {preset: load_config(preset, mine) for preset, mine in own.items()}
    places = {_place(config.output): Path(root or "", preset.stem) for preset, config in alone.items()}
    runs = []
    for preset, config in alone.items():
        moved = [("output", Path(root, preset.stem))] if root else []
        moved += [
            (f"system.{key}", places[_place(path)])
            for key, path in built_on(config.system).items()
            if root and _place(path) in places
        ]
        mine = (*own[preset], *(f"{key}={json.dumps(str(path))}" for key, path in moved))
        runs.append(ComparedRun(preset, mine, load_config(preset, mine)))
    return _ordered(runs)


def finished(config: RunConfig) -> list[Result]:
    """The test results of a run that is over, one a history; empty where the training command has something to do."""
    try:
        run = RunFolder(config.output)
        checkpoint = run.newest()
        if checkpoint is None or not _is_over(config, run, checkpoint):
            return []
        step = run.best().progress.step
    except (ConfigError, CheckpointError, DatasetError):
        return []  # the training command says what is wrong
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
    # A language model in another place may be another one: only the training command can tell.
    same_places = run.config().system == with_absolute_paths(config).system
    sources = {key: RunFolder(path).best().weights_sha256 for key, path in built_on(config.system).items()}
    return (
        (identity.config_hash, identity.dataset_fingerprint) == (config_hash(config), manifest.fingerprint)
        and same_places
        and identity.built_on == sources
        and progress.validated_step == progress.step
        and Schedule.of(config.train, manifest.num_users).is_over(progress, config.train.patience)
    )


def _words_of(preset: Path, words: Sequence[str]) -> list[str]:
    mine = []
    for word in words:
        names, scoped, own = word.partition(":")
        if not scoped or "=" in names:
            mine += applicable(preset, [word])
        elif preset.stem in names.split(","):
            mine.append(own)
    return mine


def _check_used(word: str, presets: Sequence[Path]) -> None:
    """Refuse a word that would change no run: a mistyped key, or a name that no preset has."""
    if any(_words_of(preset, [word]) for preset in presets):
        return
    names, scoped, _ = word.partition(":")
    if scoped and "=" not in names:
        raise ConfigError(f"'{word}': no preset is called {names} (one of: {', '.join(p.stem for p in presets)})")
    load_config(presets[0], [word])  # which names the closest key


def _ordered(runs: Sequence[ComparedRun]) -> list[ComparedRun]:
    """As given, but each behind what it builds on."""
    folders = [_place(run.config.output) for run in runs]
    if shared := next((run for run in runs if folders.count(_place(run.config.output)) > 1), None):
        raise ConfigError(f"two presets write to {shared.config.output}: compare one of them, or rename one's output")
    ordered: list[ComparedRun] = []
    while waiting := [run for run in runs if run not in ordered]:
        free = [run for run in waiting if not any(run.builds_on(other) for other in waiting)]
        if not free:
            raise ConfigError(f"{waiting[0].preset} builds on its own output {waiting[0].config.output}: fix its paths")
        ordered.append(free[0])
    return ordered


def _place(path: Path) -> Path:
    return path.absolute().resolve()
