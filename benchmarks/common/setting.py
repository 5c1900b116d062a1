"""Inputs of benchmarks: a synthetic dataset, or the dataset, teacher and LLM that `make quickstart` leaves."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from shards.__main__ import main as shards_main
from shards.synthetic import write_world

PRESET = Path(__file__).parents[2] / "trainer" / "presets" / "llm_srec.yaml"

LLMS: dict[str, dict[str, Any]] = {
    "Llama-3.2-3B": {
        "model_type": "llama", "hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24,
        "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 8192, "vocab_size": 128256,
    },
    "Llama-3.1-8B": {
        "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 14336, "vocab_size": 128256,
    },
    "Llama-3.1-70B": {
        "model_type": "llama", "hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 28672, "vocab_size": 128256,
    },
}  # fmt: skip
"""Architecture settings of each LLM, as in its config.json."""


def synthetic_dataset(folder: Path, *, users: int, items: int, words: str, **world: int) -> Path:
    """Build a synthetic dataset in `folder`.

    Args:
        words: further options of `python -m shards build`.
        world: further arguments of `write_world`.

    Raises:
        SystemExit: the build failed.
    """
    reviews, catalog = write_world(folder / "raw", users=users, items=items, **world)
    source = f"--source table --time-unit ms --reviews {reviews} --meta {catalog} --name synthetic --title-negatives 1"
    if shards_main(["build", f"{folder}/data", *source.split(), *words.split()]):
        raise SystemExit(2)
    return folder / "data"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --data, --teacher, --llm and --layers."""
    parser.add_argument("--data", type=Path, default=Path("data/ml-100k"), help="dataset folder")
    parser.add_argument("--teacher", type=Path, default=Path("runs/quickstart/sasrec"), help="run folder of a SASRec")
    parser.add_argument("--llm", type=Path, default=Path("cache/smollm2-135m"), help="LLM folder")
    parser.add_argument("--layers", type=int, help="run only the first layers of the LLM")


def overrides(options: argparse.Namespace) -> list[str]:
    """Overrides of `PRESET` for these arguments."""
    layers = [f"system.llm.layers={options.layers}"] if options.layers else []
    return [
        f"data.path={options.data}", f"system.teacher={options.teacher}", f"system.llm.path={options.llm}",
        "system.llm.dtype=float32", *layers,
    ]  # fmt: skip
