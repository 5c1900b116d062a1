"""Sweeps: every combination of the values of some settings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

from trainer.config import ConfigError


def sweep(axes: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Every combination of `key=v1,v2` axes, as the name of its run folder and its overrides.

    Without axes there is one combination, without a name.

    Raises:
        ConfigError: an axis is not `key=v1,v2`, or sets `output`, which follows from the values.
    """
    columns = []
    for axis in axes:
        key, separator, values = axis.partition("=")
        if not separator or not key or not all(values.split(",")):
            raise ConfigError(f"--sweep {axis}: write section.key=value,value, for example train.lr=1e-4,3e-4")
        if key == "output":
            raise ConfigError(
                "--sweep output=...: each run of a sweep gets its own folder below output; sweep another key"
            )
        columns.append([f"{key}={value}" for value in values.split(",")])
    for words in product(*columns):
        yield folder_name(words), list(words)


def folder_name(words: Sequence[str]) -> str:
    """The name of the folder of a combination."""
    return "_".join(words).replace("/", "-")


def seed_axis(seeds: int) -> list[str]:
    """The axis of the seeds 0 to N - 1.

    Raises:
        ConfigError: N is below 1.
    """
    if seeds < 1:
        raise ConfigError(f"--seeds {seeds}: give the number of seeds")
    return [f"seed={','.join(map(str, range(seeds)))}"]
