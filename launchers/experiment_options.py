"""Command line options that say which experiment is meant; of `experiment.py` and `submit.py --experiment`."""

from __future__ import annotations

import argparse
from pathlib import Path

from trainer.config import ConfigError
from trainer.config.presets import names_in
from trainer.workflows.experiments.experiment import Asked


def add_experiment_options(parser: argparse.ArgumentParser) -> None:
    """Add all of them but the experiment's name."""
    group = parser.add_argument_group("experiment")
    group.add_argument("--data", type=Path, metavar="DIR", help="dataset folder")
    group.add_argument("--recipe", type=Path, default=Path("paper"), metavar="NAME",
        help=f"how each system is trained: {', '.join(names_in('recipes'))}, or a YAML file")  # fmt: skip
    group.add_argument("--systems", nargs="+", default=[], metavar="NAME", help="some of the experiment's systems")
    group.add_argument("--seeds", type=int, default=1, help="train everything with the seeds 0 to N - 1")
    group.add_argument("--one-teacher", action="store_true",
        help="train teachers and first stages with seed 0 alone, for all seeds of what builds on them")  # fmt: skip
    group.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE",
        help="a setting of all runs that have the key; NAME:section.key=value: of one system; repeat")  # fmt: skip
    group.add_argument("--option", action="append", default=[], metavar="NAME=VALUE",
        help="a choice that the paper leaves open; experiment.py --dry-run lists them; repeat")  # fmt: skip
    group.add_argument("--other", type=Path, nargs="+", default=[], metavar="DIR", help="datasets to test on (table7)")
    group.add_argument("--runs", type=Path, default=Path("runs/experiments"), metavar="DIR",
        help="folder of the runs that all experiments share (default: runs/experiments)")  # fmt: skip


def asked_of(name: Path, options: argparse.Namespace) -> Asked:
    """The request that the options make.

    Raises:
        ConfigError: there is no `--data`.
    """
    if options.data is None:
        raise ConfigError("give the dataset: --data DIR")
    return Asked(
        name=name,
        data=options.data,
        recipe=options.recipe,
        systems=tuple(options.systems),
        seeds=options.seeds,
        one_source=options.one_teacher,
        options=tuple(options.option),
        overrides=tuple(options.set),
        others=tuple(options.other),
        root=options.runs,
    )
