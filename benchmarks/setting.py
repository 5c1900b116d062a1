"""What benchmarks run on: a synthetic dataset, or, around a language model, what `make quickstart` leaves."""

from __future__ import annotations

import argparse
from pathlib import Path

from shards.__main__ import main as shards_main
from shards.synthetic import write_world

PRESET = Path(__file__).parents[1] / "trainer" / "presets" / "llm_srec.yaml"


def synthetic_dataset(folder: Path, *, users: int, items: int, words: str) -> Path:
    """A dataset built in `folder`; `words` are further options of `python -m shards build`."""
    reviews, catalog = write_world(folder / "raw", users=users, items=items)
    source = f"--source table --time-unit ms --reviews {reviews} --meta {catalog} --name synthetic --title-negatives 1"
    if shards_main(["build", f"{folder}/data", *source.split(), *words.split()]):
        raise SystemExit(2)
    return folder / "data"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--data, --teacher, --llm and --layers."""
    parser.add_argument("--data", type=Path, default=Path("data/ml-100k"))
    parser.add_argument("--teacher", type=Path, default=Path("runs/quickstart/sasrec"), help="a trained SASRec run")
    parser.add_argument("--llm", type=Path, default=Path("cache/smollm2-135m"))
    parser.add_argument("--layers", type=int, help="run only the first layers of the LLM")


def overrides(options: argparse.Namespace) -> list[str]:
    """What these arguments change in `PRESET`."""
    layers = [f"system.llm.layers={options.layers}"] if options.layers else []
    return [
        f"data.path={options.data}", f"system.teacher={options.teacher}", f"system.llm.path={options.llm}",
        "system.llm.dtype=float32", *layers,
    ]  # fmt: skip
