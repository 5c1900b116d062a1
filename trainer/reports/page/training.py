"""Sections about training: what was run, curves, throughput and memory."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from trainer.config import flatten
from trainer.reports.page.content import MISSING, Block, Cell, Facts, Figure, Panel, Section, Table, Text
from trainer.reports.page.figures import Line, line_chart
from trainer.reports.page.run_record import RunRecord

_SCALE = 8.0
"""Runs whose lengths differ by more than this factor share a logarithmic axis."""
_OPTIMIZATION = ("train/loss", "train/lr", "train/grad_norm")
_GIB = 2**30
_Values = Sequence[Cell | str | float | None]


def what_was_run(runs: Sequence[RunRecord]) -> Section:
    """The systems, their data and the settings in which they differ."""
    if len(runs) == 1:
        return Section("What was run", (Facts(tuple(_facts(runs[0]))),))
    columns = ["run", "system", "dataset", "language model", "steps", "best step", "users per step", "learning rate"]
    rows: list[_Values] = [
        [
            run.label,
            run.config.system.name,
            run.result.dataset if run.result else run.config.data.path.name,
            _language_model(run),
            run.newest.progress.step if run.newest else None,
            run.best.progress.step if run.best else None,
            run.config.train.batch_size,
            Cell(f"{run.config.train.lr:g}", run.config.train.lr),
        ]
        for run in runs
    ]
    return Section("What was run", (Table.of(columns, rows), *_differing(runs)))


def curves(runs: Sequence[RunRecord]) -> Section | None:
    """Validation metrics of all runs on one axis, and each run's own losses; None without any."""
    blocks: list[Block] = []
    legend = tuple((run.label, style) for style, run in enumerate(runs)) if len(runs) > 1 else ()
    names = list(dict.fromkeys([*(f"valid/{run.config.train.metric}" for run in runs), "valid/HR@10", "valid/MRR"]))
    if panels := [panel for name in names[:3] if (panel := _validation(runs, name))]:
        caption = "Validation while training, on original histories."
        if len({run.config.evaluation.valid_users or run.config.evaluation.users for run in runs}) > 1:
            caption += " Not all runs validated on the same users (evaluation.valid_users)."
        blocks.append(Figure(tuple(panels), legend, caption))
    for style, run in enumerate(runs):
        parts = [name for name in run.points if name.startswith("train/") and name not in _OPTIMIZATION]
        shown = ["train/loss", *(parts if len(parts) > 1 else []), "train/grad_norm"]
        panels = [_own(run, style, name) for name in shown if name in run.points]
        if panels:
            blocks.append(Figure(tuple(panels), caption=f"{run.label}: loss, its unweighted parts, gradient norm."))
    return Section("Curves", tuple(blocks)) if blocks else None


def throughput(runs: Sequence[RunRecord]) -> Section | None:
    """Speed, time and memory of training and of the test; None if nothing was logged."""
    columns = [
        "run", "ranks", "users/s", "LLM tokens/s", "training", "validations", "test", "peak memory, GiB", "goodput",
        "device",
    ]  # fmt: skip
    rows: list[_Values] = []
    for run in runs:
        useful = run.newest.progress.useful_seconds if run.newest else 0.0
        _, validations = run.points.get("speed/validation_seconds", ((), ()))
        tested = run.original or run.shuffled
        peaks = [max(values) for name, (_, values) in run.points.items() if name.startswith("memory/peak")]
        memory = max([*peaks, tested.peak_memory_bytes / _GIB if tested else 0.0])
        rows.append(
            [
                run.label,
                run.newest.progress.world_size if run.newest else None,
                _median(run, "speed/users_per_second"),
                _median(run, "speed/useful_tokens_per_second"),
                _duration(useful),
                _duration(sum(validations)),
                _duration(tested.seconds if tested else 0.0),
                Cell(f"{memory:.2f}", memory) if memory else None,
                _last(run, "speed/goodput"),
                tested.device if tested else None,
            ]
        )
    if not any(run.points for run in runs):
        return None
    note = (
        "Rates: medians over the logged steps. Goodput: share of the wall-clock time since the start spent on steps. "
    )
    note += "Memory: the largest of one rank. Tokens: those of the prompts, without what packing saves."
    blocks: list[Block] = [Table.of(columns, rows, note=note)]
    panels = [
        panel
        for title, name in (("Users per second", "speed/users_per_second"), ("Peak memory, GiB", "memory/peak_gib"))
        if (panel := _together(runs, title, name))
    ]
    legend = tuple((run.label, style) for style, run in enumerate(runs)) if len(runs) > 1 else ()
    return Section("Throughput and memory", (*blocks, *([Figure(tuple(panels), legend)] if panels else [])))


def _facts(run: RunRecord) -> list[tuple[str, str]]:
    config, train = run.config, run.config.train
    best, newest = run.best, run.newest
    facts = [
        ("system", config.system.name),
        ("dataset", run.result.dataset if run.result else config.data.path.name),
        ("task", config.task),
        ("users per step", f"{train.batch_size:,}"),
        ("learning rate", f"{train.lr:g}"),
        ("chosen by", f"{train.metric} on the validation split"),
    ]
    if model := _language_model(run):
        facts.insert(1, ("language model", model))
    if newest:
        facts.append(("steps", f"{newest.progress.step:,} on {ranks(newest.progress.world_size)}"))
    if best:
        facts.append(("best checkpoint", f"step {best.progress.step:,}, {train.metric} {best.progress.best_value:.4f}"))
    if run.result:
        facts.append(("tested on", f"{run.result.users:,} users, {run.result.device}"))
    return facts


def ranks(count: int) -> str:
    """A number of ranks in words."""
    return f"{count} rank{'s' * (count > 1)}"


def _language_model(run: RunRecord) -> str | None:
    llm = getattr(run.config.system, "llm", None)
    if llm is None:
        return None
    layers = f", {llm.layers} layers" if llm.layers else ""
    return f"{Path(llm.path).name}{layers}, {llm.dtype}"


def _differing(runs: Sequence[RunRecord]) -> list[Block]:
    """A table of the settings that differ between runs of one system."""
    blocks: list[Block] = []
    systems: dict[str, list[RunRecord]] = {}
    for run in runs:
        systems.setdefault(run.config.system.name, []).append(run)
    for name, group in systems.items():
        settings = [_settings(run) for run in group]
        keys = [key for key in settings[0] if len({of.get(key) for of in settings}) > 1]
        if len(group) > 1 and keys:
            rows: list[_Values] = [
                [run.label, *(of.get(key) for key in keys)] for run, of in zip(group, settings, strict=True)
            ]
            blocks.append(Table.of(["run", *keys], rows, title=f"Settings that differ between runs of {name}"))
    if not blocks and len(runs) > 1:
        return [Text("Every run is of a different system; the files under Reproduce hold all settings.")]
    return blocks


def _settings(run: RunRecord) -> Mapping[str, str]:
    """Settings that change results or speed, as text, by their keys from the top."""
    tree = run.config.model_dump(mode="json", exclude={"output", "resume"})
    return {".".join(keys): MISSING if value is None else f"{value}" for keys, value in flatten(tree)}


def _validation(runs: Sequence[RunRecord], name: str) -> Panel | None:
    """One validation metric of all runs, by the users trained on, where one step of any run counts the same."""
    lines = [
        Line(style, [step * run.config.train.batch_size for step in run.points[name][0]], run.points[name][1])
        for style, run in enumerate(runs)
        if name in run.points
    ]
    if all(len(line.x) < 2 for line in lines):
        return None  # one point is not a curve
    ends = [max(line.x) for line in lines]
    title = name.removeprefix("valid/")
    return line_chart(title, lines, "users trained on", log_x=max(ends) > _SCALE * min(ends))


def _own(run: RunRecord, style: int, name: str) -> Panel:
    steps, values = run.points[name]
    log_y = name == "train/grad_norm" and min(values) > 0
    return line_chart(f"{run.label}: {name.removeprefix('train/')}", [Line(style, steps, values)], "step", log_y=log_y)


def _together(runs: Sequence[RunRecord], title: str, name: str) -> Panel | None:
    """A quantity of all runs over the share of each run, with a logarithmic axis if they differ much."""
    lines = []
    for style, run in enumerate(runs):
        if name in run.points:
            steps, values = run.points[name]
            lines.append(Line(style, [100 * step / steps[-1] for step in steps], values))
    if not lines:
        return None
    levels = [statistics.median(line.y) for line in lines]
    log_y = min(min(line.y) for line in lines) > 0 and max(levels) > _SCALE * min(levels)
    return line_chart(title, lines, "percent of the run", log_y=log_y)


def _median(run: RunRecord, name: str) -> Cell | None:
    if name not in run.points:
        return None
    value = statistics.median(run.points[name][1])
    return Cell(f"{value:,.0f}" if value >= 100 else f"{value:.1f}", value)


def _last(run: RunRecord, name: str) -> Cell | None:
    if name not in run.points:
        return None
    value = run.points[name][1][-1]
    return Cell(f"{100 * value:.0f} %", value)


def _duration(seconds: float) -> Cell | None:
    if not seconds:
        return None
    whole = round(seconds)
    text = f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}" if whole >= 60 else f"{seconds:.1f} s"
    return Cell(text, seconds)
