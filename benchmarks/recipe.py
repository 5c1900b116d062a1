"""Trials of LLM-SRec's settings on MovieLens-100k at one budget, for [recipe.md](recipe.md).

    python -m benchmarks.recipe run batch batch_mse          # train the trials that are named; all without names
    python -m benchmarks.recipe table                        # what the finished ones reached

Each trial is the preset `quickstart_llm_srec_paper` with other settings, in 96 steps of 20 users. A run that is stopped
resumes. Needs the dataset, the teacher and the LLM of `make quickstart`, and a CPU with bf16 units, or patience.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common.machine import RESULTS, describe, write
from benchmarks.common.trained import test_results
from launchers.train import main as train

RUNS = Path("runs/recipe")
PRESET = "quickstart_llm_srec_paper"

_FOUR = ("system.llm.dtype=bfloat16", "system.targets=window")
_BATCH = (*_FOUR, "system.train_candidates=batch", "system.batch_negatives=1")
_VECTORS = (*_BATCH, "system.max_vector_items=118")
_SCORES = "system.score_distill_weight=1"

TRIALS: dict[str, tuple[str, ...]] = {
    "four": _FOUR,
    "batch": _BATCH,
    "batch_0_negatives": (*_BATCH, "system.batch_negatives=0"),
    "batch_no_log_q": (*_BATCH, "system.log_q=false"),
    "batch_mse": (*_BATCH, "system.distillation=mse"),
    "batch_scores": (*_BATCH, _SCORES),
    "batch_scores_mse": (*_BATCH, _SCORES, "system.distillation=mse"),
    "batch_warmup": (*_BATCH, "train.warmup_steps=20"),
    "batch_decay": (*_BATCH, "train.decay_steps=96"),
    "batch_decay_6e-4": (*_BATCH, "train.decay_steps=96", "train.lr=6e-4"),
    "batch_6_layers": (*_BATCH, "system.llm.layers=6"),
    "batch_token_scale": (*_BATCH, "system.projector_init=token_scale"),
    "vectors": (*_VECTORS, "system.llm.dtype=float32"),
    "vectors_lr_1e-3": (*_VECTORS, "system.llm.dtype=float32", "train.lr=1e-3"),
    "vectors_1_layer": (*_VECTORS, "system.llm.layers=1"),
    "vectors_2_layers": (*_VECTORS, "system.llm.layers=2"),
    "vectors_token_scale": (*_VECTORS, "system.projector_init=token_scale"),
    "vectors_token_scale_scores": (*_VECTORS, "system.projector_init=token_scale", _SCORES),
    "user_vector_last": (
        *_BATCH, "system.targets=last", "system.batch_negatives=15", "system.user_vector=true", _SCORES,
    ),
    "user_vector_end": (*_BATCH, "system.user_vector=end", _SCORES),
}  # fmt: skip
"""Settings by which each trial differs from the preset; a later one overrides an earlier one of the same key."""


def main() -> None:
    """Run or tabulate."""
    parser = argparse.ArgumentParser(prog="benchmarks.recipe", description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("trials", nargs="*", metavar="TRIAL", help=f"of {', '.join(TRIALS)}; default: all")
    options = parser.parse_args()
    names = options.trials or list(TRIALS)
    if unknown := [name for name in names if name not in TRIALS]:
        parser.error(f"unknown trials {', '.join(unknown)}")
    if options.what == "run":
        for name in names:
            train([PRESET, f"output={RUNS / name}", *TRIALS[name]])
    else:
        _table(names)


def _table(names: Sequence[str]) -> None:
    found = {name: results for name in names if (results := test_results(RUNS / name))}
    print("| trial | settings | NDCG@10 | HR@10 | shuffled |\n|---|---|---:|---:|---:|")
    for name, (original, shuffled) in found.items():
        ndcg, order = original.metrics["NDCG@10"], shuffled.metrics["NDCG@10"]
        print(
            f"| {name} | `{_settings(name)}` | {ndcg.value:.4f} ±{ndcg.half_width:.4f} "
            f"| {original.metrics['HR@10'].value:.4f} | {100 * (order.value / ndcg.value - 1):+.1f} % |"
        )
    rows = {
        name: {
            "settings": _settings(name),
            "NDCG@10": original.metrics["NDCG@10"].value,
            "HR@10": original.metrics["HR@10"].value,
            "NDCG@10 shuffled": shuffled.metrics["NDCG@10"].value,
        }
        for name, (original, shuffled) in found.items()
    }
    write(RESULTS / "recipe.json", {"machine": describe(), "trials": rows})


def _settings(name: str) -> str:
    """The settings of a trial that count, each key once."""
    last = dict(word.split("=") for word in TRIALS[name])
    return " ".join(f"{key}={value}" for key, value in last.items() if value != "bfloat16")


if __name__ == "__main__":
    main()
