"""Short SASRec runs on two ranks, and the same run without faults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fault_rank import Preset, start_ranks
from helpers import sasrec_config, write_config


@pytest.fixture(scope="session")
def preset(tmp_path_factory: pytest.TempPathFactory, world: Path) -> Preset:
    """Writes the preset of a run: 61 users in batches of 10, so 7 steps per epoch, the last of one user."""

    def write(output: Path, **train: Any) -> Path:
        settings = {"batch_size": 10, "epochs": 2, "validate_every": 0.5, "save_every": 100, "log_every": 1}
        config = sasrec_config(world, output, **settings | train)
        config["system"]["dropout"] = 0.3
        return write_config(tmp_path_factory.mktemp("preset") / "preset.yaml", config)

    return write


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, preset: Preset) -> Path:
    """The run folder of 14 steps without faults."""
    folder = tmp_path_factory.mktemp("undisturbed")
    ranks = start_ranks(folder, [str(preset(folder / "run"))])
    assert ranks.wait() == [0, 0], ranks.all_said
    return folder / "run"
