"""Every system on MovieLens-100k with one budget, for [quality.md](quality.md).

    python -m benchmarks.quality run llara tallrec            # train the rows that are named; all without names
    python -m benchmarks.quality table                        # what the finished ones reached

A run that is stopped resumes. Settings given as `key=value` hold for all runs of a call, e.g. `engine.threads=1`. Needs
what `make quickstart` leaves, and `python launchers/demo_models.py encoder cache/minilm`; the LLM runs in bf16, which
needs a GPU, or a CPU with AMX, or patience.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common.machine import RESULTS, describe, write
from benchmarks.common.trained import test_results
from launchers.train import main as train

RUNS = Path("runs/quality")
SEEDS = (0, 1, 2)
STEPS = 192

_TEACHER = "system.teacher=runs/quickstart/sasrec"
_LLM = (
    "system.llm.path=cache/smollm2-135m", "system.llm.layers=3", "system.llm.dtype=bfloat16",
    "system.llm.max_tokens=512", "train.lr=3e-4", "train.lr_decay=1.0", "train.validate_every=1",
    "evaluation.batch_size=32", "evaluation.valid_users=300",
)  # fmt: skip
_RETRIEVAL = (
    *_LLM, f"train.max_steps={STEPS}", f"train.decay_steps={STEPS}", f"train.decay_from={STEPS * 2 // 3}",
    "train.metric=NDCG@10", "system.readout_init=standardized", "system.train_candidates=batch",
)  # fmt: skip
_WINDOW = (*_RETRIEVAL, "system.targets=window", "system.batch_negatives=1")
# A user vector at the start of the prompt forbids that targets share it: one target per user, and more negatives.
_LAST = (*_RETRIEVAL, "system.targets=last", "system.batch_negatives=15")
_LLM_SREC = ("llm_srec", *_WINDOW, _TEACHER, "system.distillation=contrastive")
_TITLES = (*_LLM, "train.max_steps=96")

_ABLATIONS: dict[str, tuple[str, ...]] = {
    "llm_srec": _LLM_SREC,
    "llm_srec_b": (*_LLM_SREC, "system.uniformity_weight=0"),
    "llm_srec_a": (*_LLM_SREC, "system.uniformity_weight=0", "system.distill_weight=0"),
}
"""LLM-SRec, (b) without uniformity, and (a) without uniformity and distillation, as in Table 8."""

ROWS: dict[str, tuple[str, ...]] = {
    "gru4rec": ("gru4rec", "train.max_steps=975"),
    "nextitnet": ("nextitnet", "train.max_steps=975"),
    "bert4rec": ("bert4rec", "train.max_steps=4500"),
    "ctrl": ("ctrl",),
    "recformer_stage1": ("ml100k_recformer_stage1",),
    "recformer": ("ml100k_recformer_stage2", f"system.stage1={RUNS}/recformer_stage1"),
    "tallrec": ("tallrec", *_WINDOW),
    "llara": ("llara", *_WINDOW, _TEACHER),
    "collm": ("collm", *_LAST, _TEACHER),
    "a_llmrec_stage1": ("a_llmrec_stage1", _TEACHER, "train.lr=3e-4"),
    "a_llmrec": ("a_llmrec", *_LAST, _TEACHER, f"system.stage1={RUNS}/a_llmrec_stage1"),
    **{f"{name}_seed{seed}": (*words, f"seed={seed}") for seed in SEEDS for name, words in _ABLATIONS.items()},
    "tallrec_titles": ("tallrec_generation", *_TITLES),
    "llara_titles": ("llara_generation", *_TITLES, _TEACHER),
    "collm_titles": ("collm_generation", *_TITLES, _TEACHER),
    "a_llmrec_titles": ("a_llmrec_generation", *_TITLES, _TEACHER, f"system.stage1={RUNS}/a_llmrec_stage1"),
}
"""Preset and settings of each run, those that others build on first."""


def main() -> None:
    """Run or tabulate."""
    parser = argparse.ArgumentParser(prog="benchmarks.quality", description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}; default: all")
    options, settings = parser.parse_known_args()
    names = [word for word in options.rows if "=" not in word] or list(ROWS)
    settings = [word for word in [*options.rows, *settings] if "=" in word]
    if unknown := [name for name in names if name not in ROWS]:
        parser.error(f"unknown rows {', '.join(unknown)}")
    if options.what == "table":
        _table(names)
        return
    for name in names:
        preset, *words = ROWS[name]
        train([preset, f"output={RUNS / name}", *words, *settings])


def _table(names: Sequence[str]) -> None:
    found = {name: results for name in names if (results := test_results(RUNS / name))}
    print("| system | seed | steps | NDCG@10 | HR@10 | shuffled |\n|---|---:|---:|---:|---:|---:|")
    for name, (original, shuffled) in found.items():
        ndcg, order = original.metrics["NDCG@10"], shuffled.metrics["NDCG@10"]
        system, _, seed = name.partition("_seed")
        print(
            f"| {system} | {seed or 0} | {original.step} | {ndcg.value:.4f} ±{ndcg.half_width:.4f} "
            f"| {original.metrics['HR@10'].value:.4f} | {100 * (order.value / ndcg.value - 1):+.1f} % |"
        )
    rows = {
        name: {
            "step": original.step,
            **{key: original.metrics[key].value for key in ("NDCG@10", "HR@10")},
            "NDCG@10 shuffled": shuffled.metrics["NDCG@10"].value,
        }
        for name, (original, shuffled) in found.items()
    }
    write(RESULTS / "quality.json", {"machine": describe(), "runs": rows})


if __name__ == "__main__":
    main()
