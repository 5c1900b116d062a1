"""The runs of a comparison: their overrides and order, and which of them are finished; torch-free."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
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
from trainer.workflows.comparing.sweep import folder_name, sweep


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


def compared_runs(presets: Sequence[Path], overrides: Sequence[str], axes: Sequence[str] = ()) -> list[ComparedRun]:
    """Load the runs, each after the runs that it builds on.

    Args:
        presets: names or YAML files.
        overrides: `section.key=value` applies to every preset whose system has the key,
            `NAME,...:section.key=value` only to the presets of these names. `output=FOLDER` moves run NAME to
            FOLDER/NAME, and the runs that build on it read it there.
        axes: the same with several values, `section.key=v1,v2`: every combination is run, each in a folder named by
            it below the run's, and builds on the runs of the same combination.

    Raises:
        ConfigError: a preset, an override or an axis is wrong, a preset is given twice, or two presets share an output
            folder.
    """
    if twice := next((preset for preset in presets if presets.count(preset) > 1), None):
        raise ConfigError(f"{twice} is given twice: give it once, with --seeds N or --sweep section.key=value,value")
    root = next((word.partition("=")[2] for word in reversed(overrides) if word.startswith("output=")), None)
    overrides = [word for word in overrides if not word.startswith("output=")]
    combinations = [words for _, words in sweep(axes)]
    for word in [*overrides, *dict.fromkeys(word for words in combinations for word in words)]:
        _check_used(word, presets)
    own = {preset: _overrides_of(preset, overrides) for preset in presets}
    # Where a setting that is swept does not apply, as a student's to its teacher, combinations share a run.
    runs = {(run.preset, run.config.output): run for words in combinations for run in _of_combination(own, root, words)}
    return _ordered(list(runs.values()))


def _of_combination(own: Mapping[Path, Sequence[str]], root: str | None, words: Sequence[str]) -> list[ComparedRun]:
    """The runs of one combination of a sweep.

    Args:
        own: overrides by preset.
        root: folder that the runs are moved to, each by its name; None: they stay where their presets put them.
        words: overrides of the combination.
    """
    # Loaded with the outputs of the presets first, by which presets refer to each other, then with the moved ones.
    unmoved = {preset: load_config(preset, mine) for preset, mine in own.items()}
    variant = {preset: tuple(_overrides_of(preset, words)) for preset in own}
    output = {
        preset: Path(Path(root, preset.stem) if root else config.output, folder_name(variant[preset]))
        for preset, config in unmoved.items()
    }
    moved_to = {_resolved(config.output): output[preset] for preset, config in unmoved.items()}
    runs = []
    for preset, config in unmoved.items():
        moved = {"output": output[preset]} if output[preset] != config.output else {}
        for key, path in built_on(config.system).items():
            target = moved_to.get(_resolved(path))
            if target is not None and _resolved(target) != _resolved(path):
                moved[f"system.{key}"] = target
        mine = (*own[preset], *variant[preset], *(f"{key}={json.dumps(str(path))}" for key, path in moved.items()))
        label = " ".join([preset.stem, *variant[preset]]) if variant[preset] else ""
        runs.append(ComparedRun(preset, mine, load_config(preset, mine), label))
    return runs


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
        and Schedule.of(config.train, manifest.num_train_users).is_over(progress, config.train.patience)
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
