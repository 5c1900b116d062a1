"""Sections about where numbers come from: hashes, and the commands that give them again."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from trainer.config import config_hash, dump_config
from trainer.reports.page.content import Block, Cell, Commands, File, Section, Table
from trainer.reports.page.run_record import RunRecord

_Values = Sequence[Cell | str | float | None]


def provenance(runs: Sequence[RunRecord]) -> Section:
    """What identifies each run's settings, data, weights and code, a row each."""
    names = {
        "config": [config_hash(run.config) for run in runs],
        "dataset": [run.best.identity.dataset_fingerprint if run.best else _tested(run) for run in runs],
        "catalog": [run.best.identity.catalog_sha256 if run.best else "" for run in runs],
        "language model or encoder": [run.best.identity.llm if run.best else "" for run in runs],
        "weights of the best checkpoint": [run.best.weights_sha256 if run.best else "" for run in runs],
    }
    for key in sorted({key for run in runs if run.best for key in run.best.identity.built_on}):
        names[f"weights of its {key}"] = [run.best.identity.built_on.get(key, "") if run.best else "" for run in runs]
    names["commit of the test"] = [run.result.commit if run.result else "" for run in runs]
    names["tested at"] = [run.result.created[:16].replace("T", " ") + " UTC" if run.result else "" for run in runs]
    rows: list[_Values] = [
        [name, *(value or None for value in values)] for name, values in names.items() if any(values)
    ]
    note = "sha256 of files, but the config: a hash of the settings that change results."
    return Section("Provenance", (Table.of(["", *(run.label for run in runs)], rows, note=note),))


def reproduce(runs: Sequence[RunRecord], command: str) -> Section:
    """Commands that repeat the runs, their teachers first, and their settings as files.

    Args:
        command: the command that wrote the page.
    """
    lines = []
    if commits := sorted({run.result.commit for run in runs if run.result} - {"unknown"}):
        lines.append(f"git checkout {commits[0].removesuffix('+dirty')}")
    files: list[Block] = []
    for run in _dependencies_first(runs):
        name = f"{run.label.replace('/', '-')}.yaml"
        files.append(File(name, dump_config(run.config)))
        ranks = run.newest.progress.world_size if run.newest else 1
        start = "llm-srec train" if ranks == 1 else f"deepspeed --num_gpus {ranks} --module launchers.train"
        lines.append(f"{start} {shlex.quote(name)}")
    note = "Save the files below first; their paths are those of the machine that ran them."
    return Section("Reproduce", (Commands("\n".join([*lines, command]), note), *files))


def _tested(run: RunRecord) -> str:
    return run.result.dataset_fingerprint if run.result else ""


def _dependencies_first(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """In the given order, but a run after those that it builds on."""
    ordered: list[RunRecord] = []

    def add(run: RunRecord) -> None:
        needed = set(run.best.identity.built_on.values()) if run.best else set()
        for other in runs:
            if other not in ordered and other is not run and other.best and other.best.weights_sha256 in needed:
                add(other)
        if run not in ordered:
            ordered.append(run)

    for run in runs:
        add(run)
    return ordered
