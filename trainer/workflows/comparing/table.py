"""The result table of a comparison: ranked systems, and below it the stages they build on; torch-free."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from trainer.config import flatten
from trainer.config.text_systems import ALLMRecStage1Config, CTRLAlignConfig, RecformerPretrainConfig
from trainer.reports.results import Result
from trainer.reports.seeds import SeedRun, best_validation, seed_table
from trainer.reports.tables import METRICS, Style, comparison
from trainer.workflows.comparing.comparison import ComparedRun

_STAGES = (ALLMRecStage1Config, CTRLAlignConfig, RecformerPretrainConfig)
"""Pre-training that other systems build on: it gives vectors that could be ranked, but is not meant to recommend."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended: its test results, or why there are none."""

    run: ComparedRun
    results: list[Result] = field(default_factory=list)
    error: str = ""


def table(outcomes: Sequence[Outcome], style: Style) -> str:
    """The systems, best first, then the settings that differ between runs of one system, then the stages."""
    runs = [outcome.run for outcome in outcomes]
    done = [outcome for outcome in outcomes if outcome.results]
    systems = [outcome for outcome in done if not is_stage(outcome.run, runs)]
    label = labels(runs)
    results = [
        replace(result, run=label[outcome.run.preset, outcome.run.config.output])
        for outcome in sorted(systems, key=_quality, reverse=True)
        for result in outcome.results
    ]
    lines = [
        f"{outcome.run.config.system.name} ({label[outcome.run.preset, outcome.run.config.output]}): {text}"
        for outcome in systems
        if (text := differences(outcome.run, [other.run for other in systems]))
    ]
    lines += [_stage_line(outcome, runs) for outcome in done if outcome not in systems]
    ending = ("\n\n" if style == "markdown" else "\n").join(lines)
    ranked = comparison(results, style=style) if results else "no results\n"
    return f"{ranked}\n{ending}\n" if lines else ranked


def seeds_table(outcomes: Sequence[Outcome], style: Style) -> str:
    """The ranked runs grouped over seeds; "" if none of them has results on original histories."""
    runs = [outcome.run for outcome in outcomes]
    found = []
    for outcome in outcomes:
        by_history = {result.history: result for result in outcome.results}
        if "original" in by_history and not is_stage(outcome.run, runs):
            name, config = outcome.run.preset.stem, outcome.run.config
            value = best_validation(config.output)
            found.append(SeedRun(name, config, value, by_history["original"], by_history.get("shuffled")))
    return seed_table(found, style) if found else ""


def record(outcome: Outcome, runs: Sequence[ComparedRun]) -> dict[str, object]:
    """An outcome as a machine-readable record."""
    return {
        "name": outcome.run.name,
        "preset": str(outcome.run.preset),
        "output": str(outcome.run.config.output),
        "ranked": not is_stage(outcome.run, runs),
        "error": outcome.error,
        "results": [asdict(result) for result in outcome.results],
    }


def is_stage(run: ComparedRun, runs: Sequence[ComparedRun]) -> bool:
    """Whether a run is a stage that other runs build on: pre-training, alignment, an earlier stage of its system."""
    name = run.config.system.name
    return isinstance(run.config.system, _STAGES) or any(
        other.config.system.name == name and other.builds_on(run) for other in runs
    )


def labels(runs: Sequence[ComparedRun]) -> dict[tuple[Path, Path], str]:
    """A label for each run, by its preset and folder: its name, or the full path of its preset if two share a name."""
    count = Counter(run.name for run in runs)
    return {(run.preset, run.config.output): run.name if count[run.name] == 1 else str(run.preset) for run in runs}


def differences(run: ComparedRun, runs: Sequence[ComparedRun]) -> str:
    """The run's settings that differ from those of other runs of its system; empty if there are none.

    `output` is left out unless it is the only difference.
    """
    settings = [_settings(other) for other in runs if _same_system(run, other)]
    mine = _settings(run)
    differing = [key for key in mine if any(other.get(key) != mine[key] for other in settings)]
    return ", ".join(f"{key}={mine[key]}" for key in differing if key != "output" or len(differing) == 1)


def _settings(run: ComparedRun) -> dict[str, Any]:
    """All settings by their keys from the top, such as `train.lr`."""
    return {".".join(keys): value for keys, value in flatten(run.config.model_dump(mode="json"))}


def _same_system(run: ComparedRun, other: ComparedRun) -> bool:
    return run.config.system.name == other.config.system.name


def _stage_line(outcome: Outcome, runs: Sequence[ComparedRun]) -> str:
    dependents = [other.name for other in runs if other.builds_on(outcome.run)]
    metric = METRICS[outcome.results[0].task][0]
    use = f"which {' and '.join(dependents)} built on" if dependents else "which other systems build on"
    return f"not ranked: {outcome.run.name}, {use} ({metric} {_quality(outcome):.4f})"


def _quality(outcome: Outcome) -> float:
    first = next((result for result in outcome.results if result.history == "original"), outcome.results[0])
    return first.metrics[METRICS[first.task][0]].value
